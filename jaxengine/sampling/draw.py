"""How one token is drawn from the transformed logits."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.noise import gumbel
from jaxengine.sampling.transforms import Needs
from jaxengine.types import Param


class Draw(NamedTuple):
    """The last step of a sampler.

    Attributes:
      select: (logits f32[B, V], state, ctx) -> token i32[B], or (token, aux): a pytree of arrays
        [B, ...] that comes back with every token.
      init: ctx -> state of rows that are about to draw their first token.
      update: (state, drawn, ctx) -> state.
      params: Per-request values, by name.
      needs: What `ctx` must hold beside them.
      arrays: Learned weights, `ctx.arrays` inside.
      is_greedy: ctx -> bool[B], rows that take the most likely token; a step with only such rows
        needs no noise. None when there are none.
    """

    select: Callable[..., Any]
    init: Callable[[SamplingContext], Any] = lambda ctx: ()
    update: Callable[..., Any] = lambda state, drawn, ctx: state
    params: Mapping[str, Param] = {}
    needs: Needs = Needs()
    arrays: Any = ()
    is_greedy: Callable[[SamplingContext], Bool[Array, " B"]] | None = None


def _gumbel_max(logits: Float[Array, "B V"], state: Any, ctx: SamplingContext) -> Int[Array, " B"]:
    noisy = logits + gumbel(ctx.key, logits.shape[-1])
    noisy = jnp.where(_is_greedy(ctx)[:, None], logits, noisy)
    return jnp.argmax(noisy, axis=-1).astype(jnp.int32)


def _is_greedy(ctx: SamplingContext) -> Bool[Array, " B"]:
    # A chain without a temperature has no greedy rows.
    return ctx.values.get("temperature", jnp.ones(ctx.position.shape)) == 0


gumbel_max = Draw(_gumbel_max, is_greedy=_is_greedy)
"""argmax(logits + Gumbel noise) draws from softmax(logits); rows of temperature 0 are greedy,
ties going to the lowest id.

Source: Maddison et al., A* Sampling, arXiv:1411.0030 (the Gumbel-max trick)."""
