"""A weight product with what follows it as one Pallas Triton kernel on the matrix units.

For a weight so small that XLA sums parts of its depth in a second kernel. One program makes one
tile of the result over the whole depth: nothing is summed across programs, so a result does not
depend on the order in which they ran. A norm comes before, in a kernel of its own: every program
would do it anew. A deep weight with few rows is cut in its depth instead, and the parts are left
to be added up by whoever takes them: see `parts`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels.fused_linear.kernel_call import Neighbours, call_kernel
from pallas_kernels.fused_linear.reference import rms_norm
from pallas_kernels.fused_linear.tuning import TileConfig, find_parts_config
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
    rows, columns, is_inside = _tile(num_rows, num_columns, config)
    out = _product(x_ref, w_ref, rows, columns, 0, depth, config)
    if bias_ref is not None:
        column = jnp.minimum(columns, num_columns - 1)
        out += pltriton.load(bias_ref.at[column]).astype(jnp.float32)[None, :]
    where = (rows[:, None], columns[None, :])
    if residual_ref is not None:
        out += pltriton.load(residual_ref.at[where], mask=is_inside, other=0.0).astype(jnp.float32)
    pltriton.store(out_ref.at[where], out.astype(out_ref.dtype), mask=is_inside)


def _parts_kernel(x_ref, w_ref, out_ref, *, config: TileConfig):  # out [S, M, N]
    part, part_depth = pl.program_id(1), x_ref.shape[1] // out_ref.shape[0]
    rows, columns, is_inside = _tile(x_ref.shape[0], w_ref.shape[0], config)
    out = _product(x_ref, w_ref, rows, columns, part * part_depth, part_depth, config)
    pltriton.store(out_ref.at[part, rows[:, None], columns[None, :]], out, mask=is_inside)


def _tile(
    num_rows: int, num_columns: int, config: TileConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows and columns of a program's tile, and which of its entries there are."""
    tile_row = jax.lax.rem(pl.program_id(0), pl.cdiv(num_rows, config.block_m))
    tile_column = jax.lax.div(pl.program_id(0), pl.cdiv(num_rows, config.block_m))
    rows = tile_row * config.block_m + jnp.arange(config.block_m)
    columns = tile_column * config.block_n + jnp.arange(config.block_n)
    return rows, columns, (rows < num_rows)[:, None] & (columns < num_columns)[None, :]


def _product(
    x_ref,  # [M, K]
    w_ref,  # [N, K]
    rows: jax.Array,
    columns: jax.Array,
    start: jax.Array | int,
    depth: int,
    config: TileConfig,
) -> jax.Array:
    """A tile of the product over the depth from `start` on, in float32."""
    # Past an edge it is the edge again, whose result is not stored.
    row, column = (
        jnp.minimum(rows, x_ref.shape[0] - 1),
        jnp.minimum(columns, w_ref.shape[0] - 1),
    )

    def step(i, acc):
        k = i * config.block_k + jnp.arange(config.block_k)[None, :]
        mask = None if depth % config.block_k == 0 else k < depth
        other = None if mask is None else 0.0
        x = pltriton.load(x_ref.at[row[:, None], start + k], mask=mask, other=other)
        w = pltriton.load(w_ref.at[column[:, None], start + k], mask=mask, other=other)
        return acc + dot(x, w.T)

    begin = jnp.zeros((config.block_m, config.block_n), jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(depth, config.block_k), step, begin)


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
        grid=_num_tiles(num_rows, num_columns, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )


@functools.partial(jax.jit, static_argnames=("num_parts", "config", "interpret"))
def parts(
    x: Float[Array, "M K"],
    weight: Float[Array, "N K"],
    *,
    num_parts: int,
    config: TileConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "S M N"]:
    """Each part of the depth in programs of its own; see `api.product_parts`.

    Args:
      config: Tiles; None takes those of `tuning`.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    config = config or find_parts_config(x)
    if config is None:
        raise NotImplementedError(f"{x.shape[0]} rows of {x.dtype}: XLA's parts are faster")
    num_rows, num_columns = x.shape[0], weight.shape[0]
    return pl.pallas_call(
        functools.partial(_parts_kernel, config=config),
        grid=(_num_tiles(num_rows, num_columns, config), num_parts),
        out_shape=jax.ShapeDtypeStruct((num_parts, num_rows, num_columns), jnp.float32),
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * weight.size,
            transcendentals=0,
            bytes_accessed=(weight.size + x.size) * x.dtype.itemsize
            + 4 * num_parts * num_rows * num_columns,
        ),
        interpret=interpret,
        name="product_parts",
    )(x, weight)


def _num_tiles(num_rows: int, num_columns: int, config: TileConfig) -> int:
    return pl.cdiv(num_rows, config.block_m) * pl.cdiv(num_columns, config.block_n)
