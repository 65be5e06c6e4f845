"""What the two Triton kernels of the weight product share: optional operands, and the call."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

Glu = Callable[[jax.Array], jax.Array]


class Neighbours(NamedTuple):
    """Operands of what comes before and after a product, each None where it is left out.

    Attributes:
      norm: Weight of a norm of the rows.
      bias: Added to the product.
      residual: Added last.
    """

    norm: Float[Array, " K"] | None
    bias: Float[Array, " W"] | None
    residual: Float[Array, "M N"] | None


def call_kernel(
    kernel: Callable[..., None],
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    neighbours: Neighbours,
    *,
    num_columns: int,
    grid: int,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Float[Array, "M N"]:
    """Calls `kernel(x, weight, norm, bias, residual, out)`, where what is not given is None."""
    is_given = [operand is not None for operand in neighbours]

    def with_all(x_ref, w_ref, *refs):
        *optional, out_ref = refs
        given = iter(optional)
        kernel(x_ref, w_ref, *(next(given) if is_there else None for is_there in is_given), out_ref)

    with_all.__name__ = "fused_linear"
    num_rows = x.shape[0]
    return pl.pallas_call(
        with_all,
        grid=(grid,),
        out_shape=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * weight.size,
            transcendentals=num_rows * num_columns if weight.shape[0] > num_columns else 0,
            bytes_accessed=(weight.size + x.size + num_rows * num_columns) * x.dtype.itemsize,
        ),
        interpret=interpret,
        name="fused_linear",
    )(x, weight, *(operand for operand in neighbours if operand is not None))
