"""Which tiles the kernel takes for which shapes, and where a plain product is faster."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters.

    Attributes:
      block_m: Rows of a tile; 1 multiplies row by row without the matrix units.
      block_n: Columns of the result that a program makes; a power of two.
      block_k: Depth of a tile; a power of two.
      num_loads: Row by row, tiles of the weight that are fetched before the first is used.
      num_warps: Warps per program.
      num_stages: Depth of the software pipeline of tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    num_loads: int = 1
    num_warps: int = 4
    num_stages: int = 3
    triggers: bool = False


MAX_ROWS = 4


def find_config(x: jax.Array, weight: jax.Array) -> TuningConfig | None:
    """Tiles for these shapes; None where a plain product and its neighbours are faster."""
    if x.shape[0] > MAX_ROWS or x.dtype == jnp.float32:
        return None
    if x.shape[1] <= 1024:
        return TuningConfig(block_m=1, block_n=4, block_k=512, num_loads=2, num_warps=2)
    return TuningConfig(block_m=1, block_n=4, block_k=1024, num_loads=5, num_warps=4)
