"""The end of a chain as kernels do it: a temperature and the filters, applied as they read.

Logits that lie in memory are read twice and nothing of their size is written: once for the sums of
their blocks, once for what the filters leave of these. Of most tokens a draw needs no more.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.sampling.logprobs import (
    MEASURES,
    Wants,
    at_token,
    listed_if_wanted,
    one_measure,
)
from jaxengine.sampling.routes import Logits, Part, Parts, Route, apply
from pallas_kernels.filter_threshold import filter_threshold
from pallas_kernels.vocab_blocks import BlockSums, block_sums, kept_sums, tokens_of


class Tail(NamedTuple):
    """A route, taken apart.

    Attributes:
      head: What changes the logits before, if anything does.
      temperature: The last part but for the filters, if it is one.
      filters: The last part, if it is them; no other part of the route removes tokens by rank.
    """

    head: Parts
    temperature: Part | None
    filters: Part | None

    @property
    def pays(self) -> bool:
        """Whether to have the logits in memory pays.

        With filters they are read three times. Without, XLA fuses what a head makes of them into
        the one pass there is.
        """
        return self.filters is not None or not self.head


def tail_of(route: Route) -> Tail | None:
    """How kernels can end a route; None where it does not end with what they know."""
    head, rest = route
    temperature = head[-1] if head and head[-1][0].divisor else None
    filters = rest[0] if len(rest) == 1 and rest[0][0].filters else None
    if rest and not filters:
        return None
    return Tail(head[:-1] if temperature else head, temperature, filters)


class Left(NamedTuple):
    """What a tail leaves of logits.

    Attributes:
      logits: As they lie in memory.
      sums: Of their blocks, with the temperature.
      lowest: The lowest logit that the filters keep; None where there are none.
      kept: Sums of the blocks of what is left.
    """

    logits: Logits
    sums: BlockSums
    lowest: Float[Array, " B"] | None
    kept: BlockSums

    def processed(self, logits: Float[Array, "B n"]) -> Float[Array, "B n"]:
        """What is left of some of the logits, or of all."""
        if self.lowest is not None:
            # NaN stays, for the draw to report it.
            logits = jnp.where(logits < self.lowest[:, None], -jnp.inf, logits)
        return self.sums.tempered(logits)

    def tokens_of(self, block: Int[Array, " B"]) -> Float[Array, "B n"]:
        """What is left of one block of each row."""
        return self.processed(tokens_of(self.logits, block))

    def measures(
        self, raw: Logits, wants: Wants, token: Int[Array, " B"], is_changed: bool
    ) -> dict[str, Array]:
        """The logprobs of a token.

        Args:
          raw: The model's logits.
          wants: Which rows want which.
          token: The ids.
          is_changed: Whether anything was made of the model's logits.
        """
        lists = listed_if_wanted(wants, self.logits, lambda: self.sums)
        if not is_changed:
            return one_measure(token, raw, self.sums) | lists
        logit = at_token(self.logits, token)
        of_raw = block_sums(raw).logprob(at_token(raw, token))
        named = self.sums.logprob(logit), of_raw, self.kept.logprob(logit)
        return dict(zip(MEASURES, named, strict=True)) | lists


def left_by(tail: Tail, logits: Logits) -> Left:
    """What is left of the model's logits."""
    logits = apply(tail.head, logits)
    temperature = None
    if tail.temperature is not None:
        stage, _, ctx = tail.temperature
        assert stage.divisor is not None
        temperature = stage.divisor(ctx)
    sums = block_sums(logits, temperature)
    if tail.filters is None:
        return Left(logits, sums, None, sums)
    stage, _, ctx = tail.filters
    assert stage.filters is not None
    lowest = filter_threshold(logits, *stage.filters(ctx), sums=sums)
    return Left(logits, sums, lowest, kept_sums(logits, sums, lowest))
