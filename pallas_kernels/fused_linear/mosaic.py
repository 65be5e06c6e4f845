"""A weight product with its neighbours as one Mosaic GPU kernel, for many rows on Hopper.

With many rows a product is bound by the tensor cores, and what comes after it by memory: so the
neighbours are computed from the accumulators, while they are still in registers. One warpgroup per
block fetches tiles, two multiply; blocks stay on their multiprocessor and take one tile of the
result after another, so that the next tile's operands are on their way while one is finished.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend import backend
from jaxtyping import Array, Float

from pallas_kernels.fused_linear import reference

Glu = Callable[[jax.Array], jax.Array]

_NUM_MATH = 2  # warpgroups that multiply
_BLOCK_K = 64  # of bfloat16: 128 bytes, the widest swizzle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile and launch parameters.

    Attributes:
      block_m: Rows of a tile, half of them for each of two warpgroups: 128 or 256.
      block_n: Rows of the weight that meet in a tile, at most 256; with a gate half of them gates.
      num_stages: Tiles of both operands that are in flight at a time.
      cluster: Blocks that take tiles below one another and fetch the weight once: 1 or 2.
      minor: Which way neighbouring tiles lie: 0 below one another, 1 beside one another.
      width: How many tiles lie that way before the next line.
      lag: Steps by which the second warpgroup starts later, so that one multiplies while the other
        finishes its tile.
    """

    block_m: int = 128
    block_n: int = 256
    num_stages: int = 4
    cluster: int = 1
    minor: int = 0
    width: int = 8
    lag: int = 0
    direct: bool = False
    slots: int = 0


def _silu(x: jax.Array) -> jax.Array:
    # The reciprocal as a square: a division is many instructions, this is one.
    root = lax.rsqrt(1.0 + jnp.exp(-x))
    return x * (root * root)


def _swizzled(width: int) -> tuple[Any, ...]:
    swizzle = plgpu.find_swizzle(width * 16)
    return plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)


def _kernel(x_ref, w_ref, bias_ref, residual_ref, out_ref, *, is_gated: bool, config: Config):
    num_rows, depth = x_ref.shape
    out_n = config.block_n // (2 if is_gated else 1)
    rows = config.block_m // _NUM_MATH
    num_steps = depth // _BLOCK_K
    stages = min(config.num_stages, num_steps)
    chunk = next(c for c in (64, 32, 16) if out_n % c == 0)
    chunks = out_n // chunk
    slots = min(config.slots or chunks, chunks)
    if residual_ref is not None and not config.direct:
        slots = chunks
    tiles = (num_rows // (config.block_m * config.cluster), out_ref.shape[1] // out_n)
    parts = 2 if is_gated else 1
    part = config.block_n // parts
    is_shared = config.cluster > 1

    def scoped(x_smem, w_smem, out_smem, full, empty, residual_full, lagging):
        wg = lax.axis_index("wg")

        def tile_of(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            m, n = plgpu.planar_snake(index, tiles, config.minor, config.width)
            if is_shared:
                m = m * config.cluster + lax.axis_index("cluster")
            return m * config.block_m, n

        @pl.when(wg == _NUM_MATH)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def tile(info, carry):
                m, n = tile_of(info.index[0])

                def step(k, slot):
                    plgpu.barrier_wait(empty.at[slot])
                    ks = pl.ds(k * _BLOCK_K, _BLOCK_K)
                    plgpu.copy_gmem_to_smem(
                        x_ref.at[pl.ds(m, config.block_m), ks], x_smem.at[slot], full.at[slot]
                    )
                    for i in range(parts):
                        plgpu.copy_gmem_to_smem(
                            w_ref.at[pl.ds(n * part + i * out_ref.shape[1], part), ks],
                            w_smem.at[slot, pl.ds(i * part, part)],
                            full.at[slot],
                            collective_axes="cluster" if is_shared else None,
                        )
                    return _next(slot, stages)

                return lax.fori_loop(0, num_steps, step, carry)

            last = plgpu.nd_loop(
                (math.prod(tiles),), collective_axes="blocks", init_carry=jnp.int32(0)
            )(tile)
            # Nobody may leave while a neighbour still writes here.
            lax.fori_loop(0, stages, lambda _, slot: _drain(empty, slot, stages), last)

        @pl.when(wg < _NUM_MATH)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            for slot in range(stages):
                plgpu.barrier_arrive(empty.at[slot])
            mine = pl.ds(wg * rows, rows)
            if config.lag:
                @pl.when(wg == 1)
                def _():
                    plgpu.barrier_wait(lagging)

            def tile(info, carry):
                m, n = tile_of(info.index[0])
                m = m + wg * rows

                def of_chunk(ref, i):
                    return ref.at[pl.ds(m, rows), pl.ds(n * out_n + i * chunk, chunk)]

                if residual_ref is not None and config.direct:
                    residual = plgpu.load(
                        residual_ref.at[pl.ds(m, rows), pl.ds(n * out_n, out_n)],
                        layout=plgpu.Layout.WGMMA,
                        optimized=False,
                    )
                elif residual_ref is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for i in range(chunks):
                        plgpu.copy_gmem_to_smem(
                            of_chunk(residual_ref, i), out_smem.at[wg, i], residual_full.at[wg]
                        )

                def product(acc):
                    def multiply(slot):
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(
                            acc, x_smem.at[slot, mine], w_smem.at[slot].transpose((1, 0))
                        )

                    def step(k, slots):
                        slot, before = slots
                        multiply(slot)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(empty.at[before])
                        if config.lag:
                            @pl.when((k == config.lag) & (info.local_index == 0) & (wg == 0))
                            def _():
                                plgpu.barrier_arrive(lagging)
                        return _next(slot, stages), slot

                    multiply(carry)
                    slot, before = lax.fori_loop(
                        1, num_steps, step, (_next(carry, stages), carry)
                    )
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[before])
                    return acc[...], slot

                acc, slot = pl.run_scoped(
                    product, plgpu.ACC((rows, config.block_n), jnp.float32)
                )
                sums = [acc[:, i * part : (i + 1) * part] for i in range(parts)]
                if bias_ref is not None:
                    sums = [
                        s
                        + lax.broadcast_in_dim(
                            plgpu.load(
                                bias_ref.at[pl.ds(n * part + i * out_ref.shape[1], part)],
                                layout=plgpu.Layout.WGMMA.reduce(0),
                                optimized=False,
                            ).astype(jnp.float32),
                            s.shape,
                            [1],
                        )
                        for i, s in enumerate(sums)
                    ]
                out = _silu(sums[0]) * sums[1] if is_gated else sums[0]
                if residual_ref is None or config.direct:
                    if slots == chunks:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                else:
                    plgpu.barrier_wait(residual_full.at[wg])
                if residual_ref is not None and config.direct:
                    out += residual.astype(jnp.float32)
                for i in range(chunks):
                    piece = out[:, i * chunk : (i + 1) * chunk]
                    if slots < chunks:
                        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                        out_smem[wg, i % slots] = piece.astype(out_ref.dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(out_smem.at[wg, i % slots], of_chunk(out_ref, i))
                        continue
                    if residual_ref is not None and not config.direct:
                        piece += plgpu.load(
                            out_smem.at[wg, i], layout=plgpu.Layout.WGMMA
                        ).astype(jnp.float32)
                    out_smem[wg, i] = piece.astype(out_ref.dtype)
                if slots < chunks:
                    return slot
                plgpu.commit_smem()
                for i in range(chunks):
                    plgpu.copy_smem_to_gmem(out_smem.at[wg, i], of_chunk(out_ref, i))
                return slot

            plgpu.nd_loop((math.prod(tiles),), collective_axes="blocks", init_carry=jnp.int32(0))(
                tile
            )
            plgpu.wait_smem_to_gmem(0)

    dtype = x_ref.dtype
    empty: Any = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    pl.run_scoped(
        scoped,
        plgpu.SMEM((stages, config.block_m, _BLOCK_K), dtype, transforms=_swizzled(_BLOCK_K)),
        plgpu.SMEM((stages, config.block_n, _BLOCK_K), dtype, transforms=_swizzled(_BLOCK_K)),
        plgpu.SMEM((_NUM_MATH, slots, rows, chunk), dtype, transforms=_swizzled(chunk)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=1 + parts),
        (empty if is_shared else plgpu.Barrier)(num_barriers=stages, num_arrivals=_NUM_MATH),
        None
        if residual_ref is None or config.direct
        else plgpu.Barrier(num_barriers=_NUM_MATH, num_arrivals=chunks),
        plgpu.Barrier() if config.lag else None,
        collective_axes="wg",
    )


def _next(slot: jax.Array, stages: int) -> jax.Array:
    return jnp.where(slot == stages - 1, 0, slot + 1)


def _drain(empty: Any, slot: jax.Array, stages: int) -> jax.Array:
    plgpu.barrier_wait(empty.at[slot])
    return _next(slot, stages)


def _num_multiprocessors() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.num_cores if device else backend.get_default_device().core_count


@functools.partial(jax.jit, static_argnames=("eps", "glu", "config"))
def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    norm_weight: Float[Array, " K"] | None = None,
    bias: Float[Array, " W"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    eps: float = 0.0,
    glu: Glu | None = None,
    config: Config | None = None,
) -> Float[Array, "M N"]:
    """Multiplies `x` by a weight, with what comes before and after; see `api.fused_linear`."""
    config = config or Config()
    if norm_weight is not None:
        x = reference.rms_norm(x, norm_weight, eps)
    num_columns = weight.shape[0] // (1 if glu is None else 2)
    operands = dict(bias=bias, residual=residual)
    given = [name for name, operand in operands.items() if operand is not None]

    def kernel(x_ref, w_ref, *refs):
        *optional, out_ref = refs
        by_name = dict(zip(given, optional, strict=True))
        _kernel(
            x_ref,
            w_ref,
            by_name.get("bias"),
            by_name.get("residual"),
            out_ref,
            is_gated=glu is not None,
            config=config,
        )

    num_tiles = (x.shape[0] // (config.block_m * config.cluster)) * (
        weight.shape[0] // config.block_n
    )
    kernel.__name__ = "fused_linear"
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], num_columns), x.dtype),
        # Every block has a tile: the second warpgroup waits for the first one's start.
        grid=(min(_num_multiprocessors() // config.cluster, num_tiles),),
        grid_names=("blocks",),
        cluster=(config.cluster,) if config.cluster > 1 else (),
        cluster_names=("cluster",) if config.cluster > 1 else (),
        num_threads=_NUM_MATH + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(x, weight, *(operands[name] for name in given))
