"""A sampler: a transform, a draw, and how the engine runs them on the rows of a step."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.sampling import transforms
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.draw import Draw, gumbel_max
from jaxengine.sampling.transforms import Drawn, LogitsTransform, chain
from jaxengine.types import Param


class Sampler(NamedTuple):
    """What turns logits into tokens.

    Attributes:
      transform: Applied to the float32 logits, usually a `chain`.
      draw: Picks the token.
    """

    transform: LogitsTransform
    draw: Draw = gumbel_max

    @property
    def params(self) -> Mapping[str, Param]:
        """Sampling-parameter keys this sampler understands."""
        return self.transform.params


class Sample(NamedTuple):
    """One token per row.

    Attributes:
      token: Drawn ids; -2 where the logits held NaN.
      logprob: Log-probability of the token after penalties, bias and temperature and before the
        filters (SGLang's `output_token_logprobs`); 0 unless some row asked for it.
    """

    token: Int[Array, " B"]
    logprob: Float[Array, " B"]


NAN_TOKEN = -2
"""Stands for a token that could not be drawn because the logits held NaN."""


def default_sampler() -> Sampler:
    """SGLang's chain in its order: penalties, bias, temperature, then the filters."""
    return Sampler(
        chain(
            transforms.additive_penalties(),
            transforms.min_new_tokens(),
            transforms.repetition_penalty(),
            transforms.logit_bias(),
            transforms.temperature(),
            transforms.top_k_top_p_min_p(),
        )
    )


def sample(
    sampler: Sampler,
    logits: Float[Array, "B V"],
    state: Any,
    ctx: SamplingContext,
    wants_logprobs: Array,
) -> tuple[Sample, Any]:
    """Draws a token for every row and advances the sampler's state.

    Args:
      sampler: Pure functions; traced into the caller.
      logits: The model's, float32.
      state: `(transform state, draw state)` of the rows.
      ctx: The rows.
      wants_logprobs: bool[B]; the log-softmax is skipped when no row asks.
    """
    transform_state, draw_state = state
    transform = sampler.transform
    states = transform_state if transform.stages else (transform_state,)
    every = tuple(zip(transform.stages or (transform,), states, strict=True))
    always = tuple((stage, s) for stage, s in every if stage.is_on is None)

    def draw(parts: Stages, logits: Logits) -> Sample:
        token, _ = sampler.draw.select(_apply(parts, logits, ctx), draw_state, ctx)
        return finish(parts, logits, token)

    def draw_greedily(logits: Logits) -> Sample:
        return finish(always, logits, jnp.argmax(logits, axis=-1).astype(jnp.int32))

    def finish(parts: Stages, logits: Logits, token: Int[Array, " B"]) -> Sample:
        def logprob(logits: Logits) -> Float[Array, " B"]:
            # Applied anew from the raw logits: nothing is kept for it when nobody asks.
            unfiltered = _apply(_before_filters(parts), logits, ctx)
            chosen = jnp.take_along_axis(unfiltered, token[:, None], axis=-1)[:, 0]
            return chosen - jax.nn.logsumexp(unfiltered, axis=-1)

        is_wanted = (wants_logprobs & ctx.active).any()
        nothing = jnp.zeros(token.shape, jnp.float32)
        logprobs = jax.lax.cond(is_wanted, logprob, lambda _: nothing, logits)
        # argmax takes NaN for the largest, so a NaN anywhere in the row is what was drawn.
        top = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return Sample(jnp.where(jnp.isnan(top), NAN_TOKEN, token), logprobs)

    # Branches return [B] only: returning [B, V] through a branch would copy it.
    paths: list[Callable[[Logits], Sample]] = [functools.partial(draw, every)]
    path = jnp.int32(0)
    if len(always) < len(every):
        is_on = functools.reduce(
            jnp.logical_or, (stage.is_on(ctx).any() for stage, _ in every if stage.is_on)
        )
        paths.append(functools.partial(draw, always))
        path = jnp.where(is_on, 0, 1)
    if sampler.draw.is_greedy and all(stage.keeps_order for stage, _ in always):
        is_random = (~sampler.draw.is_greedy(ctx) & ctx.active).any()
        paths.append(draw_greedily)
        path = jnp.where((path == len(paths) - 2) & ~is_random, len(paths) - 1, path)
    drawn = jax.lax.switch(path, paths, logits)
    taken = Drawn(drawn.token)
    state = (
        transform.update(transform_state, taken, ctx),
        sampler.draw.update(draw_state, taken, ctx),
    )
    return drawn, state


type Logits = Float[Array, "B V"]
type Stages = tuple[tuple[LogitsTransform, Any], ...]


def _apply(parts: Stages, logits: Logits, ctx: SamplingContext) -> Logits:
    for stage, state in parts:
        logits = stage.apply(logits, state, ctx)
    return logits


def _before_filters(parts: Stages) -> Stages:
    return tuple(itertools.takewhile(lambda part: not part[0].is_filter, parts))
