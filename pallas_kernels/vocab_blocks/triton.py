"""Maxima and sums of blocks as Pallas Triton kernels: a few blocks a program, each read once.

A block is what one warp reads at a time, so that its reductions stay inside the warp.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels.triton_math import exp_tempered, inverse_of, inverses
from pallas_kernels.vocab_blocks.blocks import BLOCK, LOWEST, BlockSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Launch parameters of a kernel.

    Attributes:
      tile_blocks: Blocks of a program.
      num_warps: Warps of a program.
    """

    tile_blocks: int = 16
    num_warps: int = 4


def _tokens(x_ref, row: jax.Array, block: jax.Array, is_read: jax.Array) -> jax.Array:
    """The logits of some blocks of a row, [blocks, BLOCK]; -inf where nothing is read."""
    token = block[:, None] * BLOCK + jnp.arange(BLOCK)[None, :]
    mask = is_read[:, None] & (token < x_ref.shape[1])
    return pltriton.load(x_ref.at[row, token], mask=mask, other=-jnp.inf)


def _sums_kernel(
    x_ref,  # [B, V]
    inverses_ref,  # [B] or [1], of the temperatures
    max_ref,  # [B, blocks]
    sum_ref,  # [B, blocks]
    *,
    tile_blocks: int,
    interpret: bool,
):
    row, tile = pl.program_id(0), pl.program_id(1)
    block = tile * tile_blocks + jnp.arange(tile_blocks)
    is_block = block < max_ref.shape[1]
    x = _tokens(x_ref, row, block, is_block)
    # Finite even where all are removed: -inf - -inf is NaN.
    top = jnp.maximum(x.max(axis=1), LOWEST)
    inverse = inverse_of(inverses_ref, row)
    total = exp_tempered(x, top[:, None], inverse, interpret=interpret).sum(axis=1)
    # The hardware's maximum loses NaN; the sum does not.
    top = jnp.where(jnp.isnan(total), jnp.nan, top)
    pltriton.store(max_ref.at[row, block], top, mask=is_block)
    pltriton.store(sum_ref.at[row, block], total, mask=is_block)


def _kept_kernel(
    x_ref,  # [B, V]
    inverses_ref,  # [B] or [1], of the temperatures
    all_max_ref,  # [B, blocks]
    all_sum_ref,  # [B, blocks]
    lowest_ref,  # [B]
    max_ref,  # [B, blocks]
    sum_ref,  # [B, blocks]
    *,
    tile_blocks: int,
    interpret: bool,
):
    row, tile = pl.program_id(0), pl.program_id(1)
    block = tile * tile_blocks + jnp.arange(tile_blocks)
    is_block = block < max_ref.shape[1]
    top = pltriton.load(all_max_ref.at[row, block], mask=is_block, other=-jnp.inf)
    lowest = lowest_ref[row]
    is_filtered = lowest > -jnp.inf
    is_gone = top < lowest
    is_read = is_block & is_filtered & ~is_gone

    def read() -> jax.Array:
        x = _tokens(x_ref, row, block, is_read)
        finite = jnp.where(is_read, top, 0.0)[:, None]
        inverse = inverse_of(inverses_ref, row)
        weights = exp_tempered(x, finite, inverse, interpret=interpret)
        return jnp.where(x < lowest, 0.0, weights).sum(axis=1)

    def keep() -> jax.Array:
        total = pltriton.load(all_sum_ref.at[row, block], mask=is_block, other=0.0)
        return jnp.where(is_filtered, 0.0, total)

    total = jax.lax.cond(is_read.astype(jnp.int32).sum(axis=0) > 0, read, keep)
    pltriton.store(max_ref.at[row, block], jnp.where(is_gone, LOWEST, top), mask=is_block)
    pltriton.store(sum_ref.at[row, block], total, mask=is_block)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def block_sums(
    x: Float[Array, "B V"],
    temperature: Float[Array, " B"] | None = None,
    *,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> BlockSums:
    """Maximum and sum of exponentials of every block; see `api.block_sums`.

    Args:
      x: Logits.
      temperature: Of each row.
      config: Launch parameters; None takes the defaults.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    top, total = _call(_sums_kernel, config, interpret, x, temperature)
    return BlockSums(top, total, temperature)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def kept_sums(
    x: Float[Array, "B V"],
    sums: BlockSums,
    lowest: Float[Array, " B"],
    *,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> BlockSums:
    """Maximum and sum of exponentials of what is left of every block; see `api.kept_sums`.

    Args:
      x: Logits.
      sums: Those of `x`.
      lowest: The lowest logit that is left.
      config: Launch parameters; None takes the defaults.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    temperature = sums.temperature
    top, total = _call(_kept_kernel, config, interpret, x, temperature, sums.max, sums.sum, lowest)
    return BlockSums(top, total, temperature)


def _call(
    kernel: Any,
    config: TuningConfig | None,
    interpret: bool,
    x: Float[Array, "B V"],
    temperature: Float[Array, " B"] | None,
    *args: Array,
) -> tuple[Array, Array]:
    config = config or TuningConfig()
    num_rows, vocab_size = x.shape
    num_blocks = pl.cdiv(vocab_size, BLOCK)
    of_blocks = jax.ShapeDtypeStruct((num_rows, num_blocks), jnp.float32)
    return pl.pallas_call(
        functools.partial(kernel, tile_blocks=config.tile_blocks, interpret=interpret),
        grid=(num_rows, pl.cdiv(num_blocks, config.tile_blocks)),
        out_shape=(of_blocks, of_blocks),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=4 * x.size, transcendentals=x.size, bytes_accessed=4 * x.size
        ),
        interpret=interpret,
        name=f"block{kernel.__name__.removesuffix('_kernel')}",
    )(x, inverses(temperature), *args)
