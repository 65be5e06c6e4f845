"""Tiles of the decode kernel, and into how many programs a row's length is split."""

import dataclasses

import jax
import jax.numpy as jnp

_MAX_SPLITS = 64
_FEW_ROWS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters of the decode kernel.

    Attributes:
      block_kv: Tokens gathered per tile; a power of two, at least 16.
      num_splits: Programs along one row's length; a power of two. None chooses by shape.
      min_split_tiles: Tiles that a split takes before the next split of the row gets any.
      target_programs: With `num_splits=None`, programs to aim at over the whole grid.
      whole_from: Rows times kv heads from which rows are not split at all: on an H200 256 rows of
        1,024 tokens (14 / 2 heads of 64) take 37.7 us whole and 47.5 us in two splits.
      num_warps: Warps per program.
      num_stages: Depth of the software pipeline; one tile fewer is in flight.
    """

    block_kv: int = 64
    num_splits: int | None = None
    min_split_tiles: int = 2
    target_programs: int = 1056
    whole_from: int = 512
    num_warps: int = 4
    num_stages: int = 3


def default_config(q: jax.Array) -> TuningConfig:
    """Chooses tile parameters for a shape and dtype."""
    head_dim = q.shape[-1]
    if q.dtype == jnp.float32:
        return TuningConfig(block_kv=32, num_warps=4 if head_dim <= 128 else 8, num_stages=2)
    if q.shape[0] <= _FEW_ROWS:
        return TuningConfig(block_kv=min(max(8192 // head_dim, 16), 128), min_split_tiles=1)
    return TuningConfig(block_kv=min(max(4096 // head_dim, 16), 128))


def choose_num_splits(config: TuningConfig, batch: int, num_kv_heads: int, max_tokens: int) -> int:
    """Returns the power of two that fills the GPU at a small batch and is 1 at a large one."""
    if config.num_splits is not None:
        return config.num_splits
    if batch * num_kv_heads >= config.whole_from:
        return 1
    useful = -(-max_tokens // (config.block_kv * config.min_split_tiles))
    wanted = min(config.target_programs // (batch * num_kv_heads), useful, _MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)
