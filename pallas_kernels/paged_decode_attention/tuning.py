"""Tiles of the decode kernel, and into how many programs a row's length is split.

Measured on one H200 (driver 580, jax 0.11.2), bfloat16, 14 / 2 heads of 64, in a CUDA graph, every
call with pages of its own: microseconds by four warps a program and tiles of 64 (of 128 with one
row), then as it is chosen here, in another run; runs differed by up to 0.7 for the same variant.

| rows, tokens | | | least at 4 TB/s |
|---|---|---|---|
| 1, 288 | 7.0 | 7.5 | 0.04 |
| 5 in a bucket of 16, 1,330 to 1,990 | 11.1 | 10.9 | 1.0 |
| 48 in 64, 970 to 1,840 | 22.3 | 19.6 | 8.9 |
| 90 in 128, 760 to 1,660 | 26.7 | 25.7 | 14 |
| 201 in 256, 360 to 1,270 | 33.3 | 32.6 | 21 |
| 256, 256 | 16.4 | 16.3 | 8.4 |
| 512, 640 | 56.1 | 48.8 | 42 |

With 28 / 4 heads of 128 (the 7B shape) 256 rows of 544 tokens take 83.3 us, where by tiles of 32
and four warps they took 89.8; at 4 TB/s they would take 71.

Of 256 rows none is split: with 1,024 tokens they take 39.7 us whole and 43.3 in two splits. The
warps of a program have to agree on every tile, so few of them are faster.
"""

import dataclasses

import jax
import jax.numpy as jnp

_MAX_SPLITS = 64
_MIN_SPLITS = 4
_FEW_ROWS = 4
_MANY_ROWS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters of the decode kernel.

    Attributes:
      block_kv: Tokens gathered per tile; a power of two, at least 16.
      num_splits: Programs along one row's length; a power of two. None chooses by shape.
      min_split_tiles: Tiles that a split takes before the next split of the row gets any.
      target_programs: With `num_splits=None`, programs to aim at over the whole grid.
      whole_from: Rows times kv heads from which rows are not split at all.
      num_warps: Warps per program.
      num_stages: Depth of the software pipeline; one tile fewer is in flight.
    """

    block_kv: int = 64
    num_splits: int | None = None
    min_split_tiles: int = 4
    target_programs: int = 512
    whole_from: int = 512
    num_warps: int = 2
    num_stages: int = 3


def default_config(q: jax.Array) -> TuningConfig:
    """Chooses tile parameters for a shape and dtype."""
    head_dim = q.shape[-1]
    if q.dtype == jnp.float32:
        return TuningConfig(block_kv=32, num_warps=4 if head_dim <= 128 else 8, num_stages=2)
    if q.shape[0] <= _FEW_ROWS:
        block_kv = min(max(8192 // head_dim, 16), 128)
        return TuningConfig(block_kv=block_kv, min_split_tiles=1, num_warps=4)
    if q.shape[0] >= _MANY_ROWS and head_dim <= 64:
        return TuningConfig(block_kv=32, num_warps=1, num_stages=4)
    return TuningConfig(block_kv=min(max(8192 // head_dim, 16), 64))


def choose_num_splits(config: TuningConfig, batch: int, num_kv_heads: int, max_tokens: int) -> int:
    """Returns the power of two that fills the GPU at a small batch and is 1 at a large one."""
    if config.num_splits is not None:
        return config.num_splits
    if batch * num_kv_heads >= config.whole_from:
        return 1
    useful = -(-max_tokens // (config.block_kv * config.min_split_tiles))
    wanted = max(config.target_programs // (batch * num_kv_heads), _MIN_SPLITS)
    wanted = min(wanted, useful, _MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)
