"""Maxima and sums of blocks as a Pallas Triton kernel: a few blocks a program, each read once.

A block is what one warp reads at a time, so that its reductions stay inside the warp.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels.vocab_blocks.blocks import BLOCK, LOWEST, BlockSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Launch parameters of the kernel.

    Attributes:
      tile_blocks: Blocks of a program.
      num_warps: Warps of a program.
    """

    tile_blocks: int = 16
    num_warps: int = 4


def _kernel(
    x_ref,  # [B, V]
    max_ref,  # [B, blocks]
    sum_ref,  # [B, blocks]
    *,
    tile_blocks: int,
):
    row, tile = pl.program_id(0), pl.program_id(1)
    block = tile * tile_blocks + jnp.arange(tile_blocks)
    token = block[:, None] * BLOCK + jnp.arange(BLOCK)[None, :]
    x = pltriton.load(x_ref.at[row, token], mask=token < x_ref.shape[1], other=-jnp.inf)
    # Finite even where all are removed: -inf - -inf is NaN.
    top = jnp.maximum(x.max(axis=1), LOWEST)
    total = jnp.exp(x - top[:, None]).sum(axis=1)
    # The hardware's maximum loses NaN; the sum does not.
    top = jnp.where(jnp.isnan(total), jnp.nan, top)
    is_block = block < max_ref.shape[1]
    pltriton.store(max_ref.at[row, block], top, mask=is_block)
    pltriton.store(sum_ref.at[row, block], total, mask=is_block)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def block_sums(
    x: Float[Array, "B V"], *, config: TuningConfig | None = None, interpret: bool = False
) -> BlockSums:
    """Maximum and sum of exponentials of every block; see `api.block_sums`.

    Args:
      x: Logits.
      config: Launch parameters; None takes the defaults.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    config = config or TuningConfig()
    num_rows, vocab_size = x.shape
    num_blocks = -(-vocab_size // BLOCK)
    of_blocks = jax.ShapeDtypeStruct((num_rows, num_blocks), jnp.float32)
    top, total = pl.pallas_call(
        functools.partial(_kernel, tile_blocks=config.tile_blocks),
        grid=(num_rows, pl.cdiv(num_blocks, config.tile_blocks)),
        out_shape=(of_blocks, of_blocks),
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=3 * x.size, transcendentals=x.size, bytes_accessed=4 * x.size
        ),
        interpret=interpret,
        name="block_sums",
    )(x)
    return BlockSums(top, total)
