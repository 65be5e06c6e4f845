"""A weight product with what follows it as one Pallas Triton kernel on the matrix units.

For a weight so small that XLA sums parts of its depth in a second kernel. One program makes one
tile of the result over the whole depth: nothing is summed across programs, so a result does not
depend on the order in which they ran. A norm comes before, in a kernel of its own: every program
would do it anew.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels.fused_linear.kernel_call import Neighbours, call_kernel
from pallas_kernels.fused_linear.reference import rms_norm
from pallas_kernels.fused_linear.tuning import TileConfig
from pallas_kernels.triton_math import dot


def _kernel(
    x_ref,  # [M, K]
    w_ref,  # [N, K]
    norm_ref,  # None
    bias_ref,  # [N]
    residual_ref,  # [M, N]
    out_ref,  # [M, N]
    *,
    config: TileConfig,
):
    assert norm_ref is None
    (num_rows, depth), num_columns = x_ref.shape, w_ref.shape[0]
    tile_row = jax.lax.rem(pl.program_id(0), pl.cdiv(num_rows, config.block_m))
    tile_column = jax.lax.div(pl.program_id(0), pl.cdiv(num_rows, config.block_m))
    rows = tile_row * config.block_m + jnp.arange(config.block_m)
    columns = tile_column * config.block_n + jnp.arange(config.block_n)
    # Past an edge it is the edge again, whose result is not stored.
    row, column = jnp.minimum(rows, num_rows - 1), jnp.minimum(columns, num_columns - 1)

    def step(i, acc):
        k = i * config.block_k + jnp.arange(config.block_k)[None, :]
        mask = None if depth % config.block_k == 0 else k < depth
        other = None if mask is None else 0.0
        x = pltriton.load(x_ref.at[row[:, None], k], mask=mask, other=other)
        w = pltriton.load(w_ref.at[column[:, None], k], mask=mask, other=other)
        return acc + dot(x, w.T)

    begin = jnp.zeros((config.block_m, config.block_n), jnp.float32)
    out = jax.lax.fori_loop(0, pl.cdiv(depth, config.block_k), step, begin)
    if bias_ref is not None:
        out += pltriton.load(bias_ref.at[column]).astype(jnp.float32)[None, :]
    where = (rows[:, None], columns[None, :])
    is_inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    if residual_ref is not None:
        out += pltriton.load(residual_ref.at[where], mask=is_inside, other=0.0).astype(jnp.float32)
    pltriton.store(out_ref.at[where], out.astype(out_ref.dtype), mask=is_inside)


def call(
    x: Float[Array, "M K"],
    weight: Float[Array, "N K"],
    neighbours: Neighbours,
    *,
    eps: float,
    config: TileConfig,
    interpret: bool,
) -> Float[Array, "M N"]:
    """Runs the kernel; see `triton.fused_linear`."""
    if neighbours.norm is not None:
        x = rms_norm(x, neighbours.norm, eps)
    num_rows, num_columns = x.shape[0], weight.shape[0]
    return call_kernel(
        lambda *refs: _kernel(*refs, config=config),
        x,
        weight,
        neighbours._replace(norm=None),
        num_columns=num_columns,
        grid=pl.cdiv(num_rows, config.block_m) * pl.cdiv(num_columns, config.block_n),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
