"""Log-probabilities that are reported: of a token, of the most likely ones, of given ids.

Never a [B, V] array leaves the device for them.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.top_k import top_k
from pallas_kernels.vocab_blocks import BLOCK, BlockSums, block_sums, in_blocks, logsumexp


class Wants(NamedTuple):
    """Which rows want which logprobs.

    Attributes:
      token: Of the drawn token.
      lists: Of the most likely tokens, or of given ids; None where none does for sure.
      ids: The given ids, -1 padded.
      num_top: Most tokens a row can have listed; static.
    """

    token: Bool[Array, " B"]
    lists: Bool[Array, " B"] | None
    ids: Int[Array, "B ids"]
    num_top: int

    def among(self, active: Bool[Array, " B"]) -> "Wants":
        """What active rows want."""
        lists = None if self.lists is None else self.lists & active
        return self._replace(token=self.token & active, lists=lists)

    def any(self) -> Bool[Array, ""]:
        """Whether a row wants any."""
        return (self.token if self.lists is None else self.token | self.lists).any()


def at_token(x: Float[Array, "*B V"], token: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """x[token]."""
    return jnp.take_along_axis(x, token[..., None], axis=-1, mode="clip")[..., 0]


def token_logprob(logits: Float[Array, "*B V"], token: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """log softmax(logits)[token]."""
    return token_logprobs(token, logits)[0]


def token_logprobs(
    token: Int[Array, "*B"], *logits: Float[Array, "*B V"]
) -> tuple[Float[Array, "*B"], ...]:
    """log softmax(x)[token] of each x in `logits`, from one pass over all of them."""
    norms = logsumexp(*logits)
    return tuple(at_token(x, token) - norm for x, norm in zip(logits, norms, strict=True))


MEASURES = ("logprob", "raw_logprob", "processed_logprob")
"""Leaves of a `Sample`: SGLang's measure, the model's own, of the distribution drawn from."""


def three_measures(
    token: Int[Array, " B"],
    raw: Float[Array, "B V"],
    unfiltered: Float[Array, "B V"],
    processed: Float[Array, "B V"],
) -> dict[str, Array]:
    """Of the token, by each measure; what is the same array is measured once."""
    arrays = dict(zip(MEASURES, (unfiltered, raw, processed), strict=True))
    distinct = {id(x): x for x in arrays.values()}
    values = dict(zip(distinct, token_logprobs(token, *distinct.values()), strict=True))
    return {name: values[id(x)] for name, x in arrays.items()}


def one_measure(
    token: Int[Array, " B"], logits: Float[Array, "B V"], sums: BlockSums
) -> dict[str, Array]:
    """The same where nothing was made of the logits."""
    return dict.fromkeys(MEASURES, sums.logprob(at_token(logits, token)))


def no_logprobs(wants: Wants) -> dict[str, Array]:
    """What stands for all of them where no row wants any."""
    nothing = jnp.zeros(wants.token.shape, jnp.float32)
    return {**dict.fromkeys(MEASURES, nothing), **no_listed_logprobs(wants)}


def listed_logprobs(logits: Float[Array, "B V"], sums: BlockSums, wants: Wants) -> dict[str, Array]:
    """Logprobs of the `num_top` most likely tokens, in order, and of the given ids."""
    top, top_ids = largest(logits, wants.num_top, sums.max)
    at_ids = jnp.take_along_axis(logits, jnp.maximum(wants.ids, 0), axis=-1)
    return {
        "top_logprobs": sums.logprob(top),
        "top_ids": top_ids,
        "id_logprobs": sums.logprob(at_ids),
    }


def listed_if_wanted(
    wants: Wants, logits: Float[Array, "B V"], sums: Callable[[], BlockSums]
) -> dict[str, Array]:
    """`listed_logprobs`, where a row wants any."""
    if wants.lists is None:
        return no_listed_logprobs(wants)
    return jax.lax.cond(
        wants.lists.any(),
        lambda: listed_logprobs(logits, sums(), wants),
        lambda: no_listed_logprobs(wants),
    )


LEAVES = (*MEASURES, "top_logprobs", "top_ids", "id_logprobs")
"""All that is reported of a token by name."""


def side_by_side(leaves: Mapping[str, Array]) -> Int[Array, "B n"]:
    """The bits of all `LEAVES`, a row a token: a branch then writes one array, not six."""
    columns = (leaves[name].reshape(leaves[name].shape[0], -1) for name in LEAVES)
    return jnp.concatenate([jax.lax.bitcast_convert_type(x, jnp.int32) for x in columns], axis=-1)


def apart(rows: Int[Array, "B n"], wants: Wants) -> dict[str, Array]:
    """The `LEAVES` of the rows again."""
    widths = (1, 1, 1, wants.num_top, wants.num_top, wants.ids.shape[-1])
    columns = jnp.split(rows, np.cumsum(widths)[:-1], axis=-1)
    leaves = {
        name: x if name == "top_ids" else jax.lax.bitcast_convert_type(x, jnp.float32)
        for name, x in zip(LEAVES, columns, strict=True)
    }
    return leaves | {name: leaves[name][:, 0] for name in MEASURES}


def scores(logits: Float[Array, "B V"], token: Int[Array, " B"], wants: Wants) -> dict[str, Array]:
    """Logprobs of given tokens and the listed ones, by the model's own measure."""
    sums = block_sums(logits)
    return {
        "logprob": sums.logprob(at_token(logits, token)),
        **listed_logprobs(logits, sums, wants),
    }


def no_listed_logprobs(wants: Wants) -> dict[str, Array]:
    """What stands for the listed ones where no row wants any."""
    top = (wants.ids.shape[0], wants.num_top)
    return {
        "top_logprobs": jnp.zeros(top, jnp.float32),
        "top_ids": jnp.zeros(top, jnp.int32),
        "id_logprobs": jnp.zeros(wants.ids.shape, jnp.float32),
    }


def largest(
    x: Float[Array, "B V"], count: int, tops: Float[Array, "B blocks"] | None = None
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """The largest entries of each row, in order, the lowest index first among equals.

    The `count` blocks with the largest maxima hold them, so no more is searched.

    Args:
      x: The rows.
      count: How many; what a row has not is -inf.
      tops: Maxima of its blocks, where they are known.
    """
    num_rows, width = x.shape
    if width <= 2 * BLOCK * count:
        return _top_k(x, count)
    blocks = in_blocks(x)
    _, chosen = _top_k(blocks.max(axis=-1) if tops is None else tops, count)
    chosen = _ascending(chosen)  # for equals
    kept = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)
    columns = chosen[:, :, None] * BLOCK + jnp.arange(BLOCK)
    values, places = _top_k(kept.reshape(num_rows, -1), count)
    return values, jnp.take_along_axis(columns.reshape(num_rows, -1), places, axis=-1)


def _ascending(x: Int[Array, "B n"]) -> Int[Array, "B n"]:
    """Distinct integers in order, each put at its rank: for a few, less to compile than a sort."""
    rank = (x[:, None, :] < x[:, :, None]).sum(axis=-1)
    is_there = rank[:, None, :] == jnp.arange(x.shape[-1])[:, None]
    return jnp.where(is_there, x[:, None, :], 0).sum(axis=-1)


def _top_k(x: Float[Array, "B n"], count: int) -> tuple[Array, Array]:
    values, places = top_k(x, count=min(count, x.shape[-1]))
    missing = ((0, 0), (0, count - values.shape[-1]))
    return jnp.pad(values, missing, constant_values=-jnp.inf), jnp.pad(places, missing)
