"""Which kernel takes which shapes with which tiles, and where a plain product is faster.

Measured on one H200 (driver 580, jax 0.11.2), bfloat16, every call with weights of its own.

One row of the Qwen2.5-0.5B shape, in a chain of 24 layers: 21.9 us a layer with the row kernel,
27.2 with plain products. At four rows 31.8 and 34.5 (but for gate-up), at eight 72 and 35. Of the
7B shape, gate-up takes 80.7 us with the row kernel and 72.9 with a plain product, the others are
equal.

Tens to hundreds of rows, microseconds of the tile kernel and of plain products, norm, bias and
residual included:

| | 16 rows | 64 | 128 | 256 | 512 |
|---|---|---|---|---|---|
| qkv, 896 -> 1152 | 6.0, 4.9 | 6.5, 8.1 | 6.4, 10.1 | 8.4, 11.4 | 10.1, 9.1 |
| out, 896 -> 896 | 5.0, 6.2 | 5.2, 6.3 | 5.3, 6.6 | 6.0, 7.4 | 6.7, 7.2 |

Down in parts, 4864 -> 896, in a graph, microseconds with the parts of the tile kernel and of XLA,
whose products from 64 rows on come with a kernel that clears their workspace: with the sum and the
norm alone, and at 16 and 64 rows with everything of a layer but attention:

| 8 rows | 16 | 32 | 64 | 128 | 512 |
|---|---|---|---|---|---|
| 9.1, 11.6 | 27.3, 29.5 | 9.8, 9.5 | 29.1, 35.9 | 10.8, 11.3 | 16.6, 14.9 |

At 16 rows qkv and out stay with XLA: with tiles the layer took 31.3 and 30.6. At 64 rows out
without its residual, left to the kernel that adds parts and makes a norm, gained 0.3 to 0.5.

With wider and deeper weights it was slower than XLA everywhere (gate-up at 256 rows 20.1 and 14.0
us, down 13.9 and 11.4).

Gate-up with its norm and gated unit, microseconds of the many-rows kernel and of a plain product
and its neighbours, in a graph:

| | 128 rows | 256 | 512 | 1,024 |
|---|---|---|---|---|
| 896 -> 2 x 4864 | 12.8, 16.4 | 15.2, 18.4 | 20.9, 26.4 | 35.5, 41.5 |
| 3584 -> 2 x 18944 | | 115, 127 | | |

The same without the norm, in chains of calls that were no graph: every number holds about 20 of
launching:

| | 2,048 rows | 8,192 |
|---|---|---|
| 896 -> 2 x 4864 | 75, 89 | 216, 302 |
| 3584 -> 2 x 18944 | | 2966, 3715 |

The other products gain nothing there, and stay with XLA: out at 8,192 rows takes 44 us either way.

Other shapes than these take theirs unmeasured: `python -m pallas_kernels.fused_linear.bench`
measures them.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Tile and launch parameters of the kernel for very few rows.

    Attributes:
      block_n: Columns of the result that a program makes; a power of two.
      block_k: Depth of a tile of the weight; a power of two.
      num_loads: Tiles that are fetched before the first is used.
      num_warps: Warps per program.
    """

    block_n: int
    block_k: int
    num_loads: int
    num_warps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Tile and launch parameters of the kernel on the matrix units.

    Attributes:
      block_m: Rows of a program's tile; a power of two, at least 16.
      block_n: Columns of the tile; likewise.
      block_k: Depth that is read at once; likewise.
      num_warps: Warps per program.
      num_stages: Depth of the software pipeline; one tile fewer is in flight.
    """

    block_m: int = 64
    block_n: int
    block_k: int = 128
    num_warps: int = 4
    num_stages: int


BLOCK_M = 128
"""Rows of a tile of the many-rows kernel."""

BLOCK_K = 64
"""Its depth at a time: 128 bytes, the widest swizzle of shared memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRowsConfig:
    """Tile and launch parameters of the kernel for hundreds of rows and more on Hopper.

    Attributes:
      block_n: Rows of the weight that meet in a tile, a multiple of 16, at most 256; of a gated
        unit the first half are gates.
      num_stages: Tiles of both operands that are in flight or in use at a time.
      cluster: Blocks that make tiles below one another and share what they fetch of the weight.
      minor: Where the next tile lies: 0 below, 1 beside.
      width: How many lie that way before the next line.
      lag: Steps in depth by which half of a block's warpgroups is behind; less than `num_stages`.
    """

    block_n: int = 256
    num_stages: int = 4
    cluster: int = 1
    minor: int = 0
    width: int = 8
    lag: int = 0

    def fits(self, num_rows: int, depth: int, num_columns: int) -> bool:
        """Whether the kernel takes a product with a weight of `num_columns` rows."""
        sizes = (num_rows, self.cluster * BLOCK_M), (depth, BLOCK_K), (num_columns, 32)
        is_whole = not any(size % tile for size, tile in sizes)
        return is_whole and depth > self.lag * BLOCK_K and num_columns >= self.block_n


MAX_ROWS = 4
"""Row by row the arithmetic grows with the rows; from here on it takes longer than reading."""

TILED_ROWS = range(32, 257)
MAX_TILED_WEIGHT = 1 << 21
"""Entries of a weight from which XLA's products are faster."""

SHALLOW = RowConfig(block_n=4, block_k=1024, num_loads=1, num_warps=4)
SHALLOW_GATED = RowConfig(block_n=2, block_k=512, num_loads=2, num_warps=2)
MIDDLE = RowConfig(block_n=4, block_k=512, num_loads=2, num_warps=2)
DEEP = RowConfig(block_n=4, block_k=2048, num_loads=3, num_warps=8)
DEEPEST = RowConfig(block_n=4, block_k=256, num_loads=7, num_warps=4)

NUM_MULTIPROCESSORS = 132
FEWER_THAN_THOUSANDS = range(BLOCK_M, 2048)
STAGES = {256: 4, 192: 5, 160: 6, 96: 7}
"""Of every `block_n` to choose from, as many as fit into shared memory."""

SOME_THOUSANDS = ManyRowsConfig()
MANY_THOUSANDS = ManyRowsConfig(cluster=2, lag=2)
MANY_THOUSANDS_DEEP = ManyRowsConfig(cluster=2, minor=1)

WIDE_TILES = TileConfig(block_n=64, num_stages=3)
TILES = TileConfig(block_n=32, num_stages=5)
NARROW_TILES = TileConfig(block_n=16, num_stages=5)


TILES_OF_PARTS = {
    range(1, 17): TileConfig(block_m=16, block_n=64, num_stages=4),
    range(33, 65): TileConfig(block_n=32, block_k=64, num_stages=8),
    range(65, 129): TileConfig(block_n=64, num_stages=4),
}


def find_parts_config(x: jax.Array) -> TileConfig | None:
    """The tiles of a product of `x` in parts; None where XLA's are faster."""
    if x.dtype == jnp.float32:
        return None
    return next((tiles for rows, tiles in TILES_OF_PARTS.items() if x.shape[0] in rows), None)


def find_config(
    x: jax.Array, weight: jax.Array, *, is_gated: bool
) -> RowConfig | TileConfig | ManyRowsConfig | None:
    """The kernel for these shapes; None where a plain product and its neighbours are faster."""
    num_rows, depth = x.shape
    if x.dtype == jnp.float32:
        return None
    if num_rows <= (1 if is_gated else MAX_ROWS):
        return _row_config(depth, is_gated=is_gated)
    if num_rows in TILED_ROWS and weight.size <= MAX_TILED_WEIGHT and not is_gated:
        return _tile_config(num_rows, weight.shape[0])
    return _many_rows_config(x, weight, is_gated=is_gated) if num_rows >= BLOCK_M else None


def _row_config(depth: int, *, is_gated: bool) -> RowConfig | None:
    if depth <= 1024:
        return SHALLOW_GATED if is_gated else SHALLOW
    if is_gated:
        return None
    return MIDDLE if depth <= 4096 else DEEP if depth <= 8192 else DEEPEST


def _tile_config(num_rows: int, num_columns: int) -> TileConfig:
    """The widest tiles that give the GPU enough programs."""

    def num_programs(config: TileConfig) -> int:
        return -(-num_rows // config.block_m) * -(-num_columns // config.block_n)

    fits = (config for config in (WIDE_TILES, TILES) if num_programs(config) >= 64)
    return next(fits, NARROW_TILES)


def _many_rows_config(x: jax.Array, weight: jax.Array, *, is_gated: bool) -> ManyRowsConfig | None:
    (num_rows, depth), num_columns = x.shape, weight.shape[0]
    config = SOME_THOUSANDS
    if num_rows in FEWER_THAN_THOUSANDS:
        config = _hundreds_config(num_rows, num_columns)
    elif num_rows >= 8192:
        config = MANY_THOUSANDS if depth <= 1024 else MANY_THOUSANDS_DEEP
    is_served = is_gated and x.dtype == jnp.bfloat16
    return config if is_served and config.fits(num_rows, depth, num_columns) else None


def _hundreds_config(num_rows: int, num_columns: int) -> ManyRowsConfig:
    """The tiles that are over first: with few of them much depends on how many a block makes."""

    def time(block_n: int) -> int:
        num_tiles = -(-num_rows // BLOCK_M) * -(-num_columns // block_n)
        return -(-num_tiles // NUM_MULTIPROCESSORS) * block_n

    block_n = min(STAGES, key=time)
    return ManyRowsConfig(
        block_n=block_n,
        num_stages=STAGES[block_n],
        cluster=2 if num_rows % (2 * BLOCK_M) == 0 else 1,
    )
