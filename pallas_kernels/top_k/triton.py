"""The largest entries of a row as a Pallas Triton kernel: the row in registers, one taken a time.

Made for a few dozen out of a few thousand, where a sort does far more than is asked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.triton_math import float_of_order, order_of_float

MAX_WIDTH = 8192
"""Entries of a row that one program holds."""

_TAKEN = np.int32(np.iinfo(np.int32).min)  # below every float, -inf and NaN included


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Launch parameters of the kernel.

    Attributes:
      num_warps: Warps per program.
    """

    num_warps: int = 4


def _kernel(
    x_ref,  # [B, n]
    values_ref,  # [B, count]
    places_ref,  # [B, count]
):
    row = pl.program_id(0)
    width, count = x_ref.shape[1], values_ref.shape[1]
    place = jnp.arange(pl.next_power_of_2(width))
    x = pltriton.load(x_ref.at[row, place], mask=place < width, other=-jnp.inf)
    order = jnp.where(place < width, order_of_float(x), _TAKEN)

    def take(i: jax.Array, order: jax.Array) -> jax.Array:
        best = order.max(axis=0)
        at = jnp.where(order == best, place, width - 1).min(axis=0)
        values_ref[row, i] = float_of_order(best)
        places_ref[row, i] = at
        return jnp.where(place == at, _TAKEN, order)

    jax.lax.fori_loop(0, count, take, order)


@functools.partial(jax.jit, static_argnames=("count", "config", "interpret"))
def top_k(
    x: Float[Array, "B n"],
    *,
    count: int,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """Finds the largest entries of each row; see `api.top_k`.

    Args:
      config: Launch parameters; None takes the defaults.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    num_rows, width = x.shape
    if width > MAX_WIDTH:
        raise NotImplementedError(f"a row of {width} is longer than {MAX_WIDTH}")
    values, places = pl.pallas_call(
        _kernel,
        grid=(num_rows,),
        out_shape=(
            jax.ShapeDtypeStruct((num_rows, count), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, count), jnp.int32),
        ),
        compiler_params=pltriton.CompilerParams(
            num_warps=(config or TuningConfig()).num_warps, num_stages=1
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * count * x.size, transcendentals=0, bytes_accessed=4 * x.size
        ),
        interpret=interpret,
        name="top_k",
    )(x)
    return values, places
