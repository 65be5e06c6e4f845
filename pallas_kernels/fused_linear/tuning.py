"""Which tiles the kernel takes for which shapes, and where a plain product is faster.

Measured on one H200 (driver 580, jax 0.11.2), bfloat16, as the time of a layer in a chain of 24
layers of the Qwen2.5-0.5B shape, each with weights of its own, one product changed at a time. At
one row the layer takes 22 us with the kernel and 28.6 us with plain products, at four rows 31.8 and
34.5, at eight 72 and 35. On the matrix units, in tiles of 16 rows and more, the kernel was nowhere
more than 3 % faster than what XLA chooses, so it has no such path. Other shapes than that model's
take theirs unmeasured: `python -m pallas_kernels.fused_linear.bench` measures them.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters.

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


MAX_ROWS = 4
"""Row by row the arithmetic grows with the rows; from here on it takes longer than reading."""

SHALLOW = TuningConfig(block_n=4, block_k=1024, num_loads=1, num_warps=4)
SHALLOW_GATED = TuningConfig(block_n=2, block_k=512, num_loads=2, num_warps=2)
MIDDLE = TuningConfig(block_n=4, block_k=512, num_loads=7, num_warps=4)
MIDDLE_GATED = TuningConfig(block_n=2, block_k=512, num_loads=7, num_warps=4)
DEEP = TuningConfig(block_n=4, block_k=2048, num_loads=3, num_warps=8)


def find_config(x: jax.Array, weight: jax.Array, *, is_gated: bool) -> TuningConfig | None:
    """Tiles for these shapes; None where a plain product and its neighbours are faster."""
    num_rows, depth = x.shape
    if x.dtype == jnp.float32 or num_rows > (1 if is_gated else MAX_ROWS):
        return None
    if depth > 4096:
        return DEEP
    if depth > 1024:
        return MIDDLE_GATED if is_gated else MIDDLE
    return SHALLOW_GATED if is_gated else SHALLOW
