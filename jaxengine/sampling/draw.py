"""How one token is drawn from the transformed logits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import Needs
from jaxengine.types import Param
from pallas_kernels.vocab_blocks import WIDE_BLOCK, BlockSums, tokens_of, wide_sums

type TokensOf = Callable[[Int[Array, " B"]], Float[Array, "B n"]]
"""The logits of one block of each row."""


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
      by_blocks: (sums of blocks of logits, block i32[B] -> its logits f32[B, n], ctx) -> token
        i32[B], if `select` is nothing but this. Logits that lie in memory are then drawn from by
        what kernels made of their blocks.
    """

    select: Callable[..., Any]
    init: Callable[[SamplingContext], Any] = lambda ctx: ()
    update: Callable[..., Any] = lambda state, drawn, ctx: state
    params: Mapping[str, Param] = {}
    needs: Needs = Needs()
    arrays: Any = ()
    is_greedy: Callable[[SamplingContext], Bool[Array, " B"]] | None = None
    by_blocks: Callable[[BlockSums, TokensOf, SamplingContext], Int[Array, " B"]] | None = None


def _gumbel_max(logits: Float[Array, "B V"], state: Any, ctx: SamplingContext) -> Int[Array, " B"]:
    # XLA fuses what computes the logits into the pass that sums their blocks.
    of_block = functools.partial(tokens_of, logits, width=WIDE_BLOCK)
    return _by_blocks(wide_sums(logits), of_block, ctx)


def _by_blocks(
    sums: BlockSums, tokens_of_block: TokensOf, ctx: SamplingContext
) -> Int[Array, " B"]:
    is_greedy = _is_greedy(ctx)

    def most(values: Float[Array, "B n"], keys: Key[Array, " B"], greedy: Array) -> Array:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, values.shape[-1:], jnp.float32))(keys)
        return jnp.argmax(jnp.where(is_greedy[:, None], greedy, values + noise), axis=-1)

    block = most(sums.log, ctx.key, sums.max)
    tokens = tokens_of_block(block)
    keys = jax.vmap(jax.random.fold_in, (0, None))(ctx.key, _IN_BLOCK_STREAM)
    return (block * tokens.shape[-1] + most(tokens, keys, tokens)).astype(jnp.int32)


_IN_BLOCK_STREAM = 0x626C6B
"""Sets the noise inside the block apart from that of the blocks."""


def _is_greedy(ctx: SamplingContext) -> Bool[Array, " B"]:
    # A chain without a temperature has no greedy rows.
    return ctx.values.get("temperature", jnp.ones(ctx.position.shape)) == 0


gumbel_max = Draw(_gumbel_max, is_greedy=_is_greedy, by_blocks=_by_blocks)
"""argmax(x + Gumbel noise) draws from softmax(x): here a block of tokens by the log-sum-exp of
its logits, then a token of that block. The distribution is that of noise on every token, for one
pass over the logits and a hundredth of the noise. Rows of temperature 0 are greedy, ties going to
the lowest id.

Source: Maddison et al., A* Sampling, arXiv:1411.0030 (Gumbel-max, and noise by
regions)."""
