"""The kernel of `mosaic`. Importing this sets environment variables, as JAX's Mosaic GPU does.

With many rows a product is bound by the tensor cores, and whatever follows it by memory: so the
neighbours are computed from the sums while they are still in registers.

Of three warpgroups in a block, the third only fetches: tiles of both operands go into a ring of
buffers, over all tiles of the result that the block makes, so that the next tile's operands are on
their way while one is finished. The first two multiply, each half of a tile's rows. The second
starts some steps behind the first and stays behind: while one computes the neighbours, which
leaves the tensor cores idle, the other multiplies. Two blocks of a cluster make tiles below one
another, and each fetches half of the weight for both.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fused_linear.tuning import BLOCK_K, BLOCK_M, ManyRowsConfig

_NUM_MULTIPLYING = 2  # warpgroups
_ROWS = BLOCK_M // _NUM_MULTIPLYING  # of a warpgroup
_NUM_OUT_SLOTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call."""

    num_rows: int
    depth: int
    num_columns: int
    is_gated: bool
    config: ManyRowsConfig

    @property
    def num_parts(self) -> int:
        """Tiles of the weight that make a tile of the result: the gate's and what it gates."""
        return 2 if self.is_gated else 1

    @property
    def block_n(self) -> int:
        """Columns of a tile of the result."""
        return self.config.block_n // self.num_parts

    @property
    def chunk(self) -> int:
        """Columns that are stored at once; a tile begins at a multiple."""
        both = math.gcd(self.block_n, self.num_columns)
        return next(width for width in (64, 32, 16) if both % width == 0)

    @property
    def num_steps(self) -> int:
        return self.depth // BLOCK_K

    @property
    def num_stages(self) -> int:
        return min(self.config.num_stages, self.num_steps)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles; those of a cluster's blocks count as one."""
        rows = self.num_rows // (BLOCK_M * self.config.cluster)
        return rows, pl.cdiv(self.num_columns, self.block_n)

    @property
    def num_tiles(self) -> int:
        return math.prod(self.tiles)

    def place(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and first column of this block's tile."""
        m, n = plgpu.planar_snake(tile, self.tiles, self.config.minor, self.config.width)
        if self.config.cluster > 1:
            m = m * self.config.cluster + lax.axis_index("cluster")
        # A last tile that is not whole begins earlier, and makes some columns once more.
        return m * BLOCK_M, jnp.minimum(n * self.block_n, self.num_columns - self.block_n)

    def weight_rows(self, column: jax.Array) -> list[Any]:
        """Rows of the weight for the tile's columns, a slice per part."""
        return [
            pl.ds(column + part * self.num_columns, self.block_n) for part in range(self.num_parts)
        ]

    def next_slot(self, slot: jax.Array) -> jax.Array:
        return jnp.where(slot == self.num_stages - 1, 0, slot + 1)

    def for_tiles(self, body: Any) -> jax.Array:
        """Runs `body(place, is_first, slot) -> slot` for the block's tiles."""

        def one(info: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
            return body(*self.place(info.index[0]), info.local_index == 0, carry)

        loop = plgpu.nd_loop((self.num_tiles,), collective_axes="blocks", init_carry=jnp.int32(0))
        return loop(one)


class _Shared(NamedTuple):
    """What the warpgroups of a block share.

    Attributes:
      x: Ring of tiles of `x`.
      w: Ring of tiles of the weight, part below part.
      out: Slots of either multiplying warpgroup, for what is on its way to memory.
      full: Both tiles of a place in the ring have come.
      empty: Nobody reads a place in the ring any more.
      started: The first warpgroup is so far that the second may start; None without a lag.
    """

    x: Any
    w: Any
    out: Any
    full: Any
    empty: Any
    started: Any


def _fetch(x_ref, w_ref, shared: _Shared, call: _Call) -> None:
    plgpu.set_max_registers(40, action="decrease")

    def fetch_tile(row, column, is_first, slot):
        del is_first

        def step(k, slot):
            plgpu.barrier_wait(shared.empty.at[slot])
            depth = pl.ds(k * BLOCK_K, BLOCK_K)
            full = shared.full.at[slot]
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, BLOCK_M), depth], shared.x.at[slot], full)
            for part, rows in enumerate(call.weight_rows(column)):
                plgpu.copy_gmem_to_smem(
                    w_ref.at[rows, depth],
                    shared.w.at[slot, pl.ds(part * call.block_n, call.block_n)],
                    full,
                    collective_axes="cluster" if call.config.cluster > 1 else None,
                )
            return call.next_slot(slot)

        return lax.fori_loop(0, call.num_steps, step, slot)

    def drain(_, slot):
        plgpu.barrier_wait(shared.empty.at[slot])
        return call.next_slot(slot)

    # No block may leave while its neighbour still tells it what it has read.
    lax.fori_loop(0, call.num_stages, drain, call.for_tiles(fetch_tile))


def _multiply(bias_ref, residual_ref, out_ref, shared: _Shared, call: _Call) -> None:
    plgpu.set_max_registers(232, action="increase")
    warpgroup = lax.axis_index("wg")
    for slot in range(call.num_stages):
        plgpu.barrier_arrive(shared.empty.at[slot])
    if shared.started is not None:
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(shared.started))

    def multiply_tile(row, column, is_first, slot):
        rows = pl.ds(row + warpgroup * _ROWS, _ROWS)
        residual = None
        if residual_ref is not None:  # comes while the product is computed
            residual = plgpu.load(
                residual_ref.at[rows, pl.ds(column, call.block_n)],
                layout=plgpu.Layout.WGMMA,
                optimized=False,
            )
        sums, slot = pl.run_scoped(
            lambda acc: _product(acc, is_first, slot, shared, call),
            plgpu.WGMMAAccumulatorRef((_ROWS, call.config.block_n), jnp.float32),
        )
        parts = [
            sums[:, part * call.block_n : (part + 1) * call.block_n]
            for part in range(call.num_parts)
        ]
        if bias_ref is not None:
            places = call.weight_rows(column)
            parts = [p + _row(bias_ref.at[at], p) for p, at in zip(parts, places, strict=True)]
        out = _silu(parts[0]) * parts[1] if call.is_gated else parts[0]
        if residual is not None:
            out += residual.astype(jnp.float32)
        _store(out.astype(out_ref.dtype), out_ref.at[rows], column, shared.out.at[warpgroup], call)
        return slot

    call.for_tiles(multiply_tile)
    plgpu.wait_smem_to_gmem(0)


def _product(acc, is_first, slot, shared: _Shared, call: _Call):
    """Sums up a tile over the whole depth; one step's product runs while the next is awaited."""
    warpgroup = lax.axis_index("wg")

    def start(slot):
        plgpu.barrier_wait(shared.full.at[slot])
        x = shared.x.at[slot, pl.ds(warpgroup * _ROWS, _ROWS)]
        plgpu.wgmma(acc, x, shared.w.at[slot].transpose((1, 0)))

    def step(k, slots):
        slot, before = slots
        start(slot)
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(shared.empty.at[before])
        if shared.started is not None:
            is_time = is_first & (k == call.config.lag) & (warpgroup == 0)
            pl.when(is_time)(lambda: plgpu.barrier_arrive(shared.started))
        return call.next_slot(slot), slot

    start(slot)
    slot, before = lax.fori_loop(1, call.num_steps, step, (call.next_slot(slot), slot))
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(shared.empty.at[before])
    return acc[...], slot


def _row(ref, like: jax.Array) -> jax.Array:
    row = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(row.astype(jnp.float32), like.shape, [1])


def _silu(x: jax.Array) -> jax.Array:
    # The sigmoid as a square: a reciprocal would be many instructions, this is one.
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return x * (root * root)


def _store(out: jax.Array, out_ref, column: jax.Array, slots, call: _Call) -> None:
    for i in range(call.block_n // call.chunk):
        slot = slots.at[i % _NUM_OUT_SLOTS]
        plgpu.wait_smem_to_gmem(_NUM_OUT_SLOTS - 1, wait_read_only=True)
        slot[...] = out[:, i * call.chunk : (i + 1) * call.chunk]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, out_ref.at[:, pl.ds(column + i * call.chunk, call.chunk)])


def _kernel(x_ref, w_ref, bias_ref, residual_ref, out_ref, *, call: _Call) -> None:
    def run(*buffers):
        shared = _Shared(*buffers)
        is_multiplying = lax.axis_index("wg") < _NUM_MULTIPLYING
        pl.when(is_multiplying)(lambda: _multiply(bias_ref, residual_ref, out_ref, shared, call))
        pl.when(~is_multiplying)(lambda: _fetch(x_ref, w_ref, shared, call))

    def smem(shape: tuple[int, ...]) -> Any:
        swizzle = plgpu.find_swizzle(8 * shape[-1] * x_ref.dtype.itemsize)
        tiling = (8, swizzle // x_ref.dtype.itemsize)
        transforms = (
            plgpu.TilingTransform(tiling),  # pyright: ignore[reportAbstractUsage]
            plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
        )
        return plgpu.SMEM(shape, x_ref.dtype, transforms=transforms)

    stages, config = call.num_stages, call.config
    arrivals: dict[str, Any] = dict(num_barriers=stages, num_arrivals=_NUM_MULTIPLYING)
    pl.run_scoped(
        run,
        smem((stages, BLOCK_M, BLOCK_K)),
        smem((stages, config.block_n, BLOCK_K)),
        smem((_NUM_MULTIPLYING, _NUM_OUT_SLOTS, _ROWS, call.chunk)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=1 + call.num_parts),
        plgpu.ClusterBarrier(collective_axes=("cluster",), **arrivals)
        if config.cluster > 1
        else plgpu.Barrier(**arrivals),
        plgpu.Barrier() if config.lag else None,
        collective_axes="wg",
    )


def call_kernel(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
    *,
    is_gated: bool,
    config: ManyRowsConfig,
    num_multiprocessors: int,
) -> jax.Array:
    """Multiplies whole tiles; see `mosaic.fused_linear`."""
    call = _Call(
        num_rows=x.shape[0],
        depth=x.shape[1],
        num_columns=weight.shape[0] // (2 if is_gated else 1),
        is_gated=is_gated,
        config=config,
    )
    is_given = [operand is not None for operand in (bias, residual)]

    def kernel(x_ref, w_ref, *refs):
        *optional, out_ref = refs
        given = iter(optional)
        bias_ref, residual_ref = (next(given) if is_there else None for is_there in is_given)
        _kernel(x_ref, w_ref, bias_ref, residual_ref, out_ref, call=call)

    kernel.__name__ = "fused_linear"
    is_cluster = config.cluster > 1
    # Every block has a tile, or its second warpgroup would wait forever for the first.
    num_blocks = min(num_multiprocessors // config.cluster, call.num_tiles)
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((call.num_rows, call.num_columns), x.dtype),
        grid=(num_blocks,),
        grid_names=("blocks",),
        cluster=(config.cluster,) if is_cluster else (),
        cluster_names=("cluster",) if is_cluster else (),
        num_threads=_NUM_MULTIPLYING + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(x, weight, *(operand for operand in (bias, residual) if operand is not None))
