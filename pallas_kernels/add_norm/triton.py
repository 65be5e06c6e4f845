"""The sum and its norm as a Pallas Triton kernel: one program a row."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

NUM_WARPS = 4


def _kernel(
    parts_ref,  # [S, M, N]
    residual_ref,  # [M, N]
    weight_ref,  # [N]
    x_ref,  # [M, N]
    norm_ref,  # [M, N]
    *,
    eps: float,
):
    num_parts, _, num_columns = parts_ref.shape
    row, column = pl.program_id(0), jnp.arange(pl.next_power_of_2(num_columns))
    mask = column < num_columns

    def load(ref, *index):
        return pltriton.load(ref.at[*index, column], mask=mask, other=0.0).astype(jnp.float32)

    # In a fixed order, and all on their way before the first is added.
    total = sum([load(parts_ref, part, row) for part in range(num_parts)], load(residual_ref, row))
    x = total.astype(x_ref.dtype)
    pltriton.store(x_ref.at[row, column], x, mask=mask)
    rounded = x.astype(jnp.float32)
    scale = jax.lax.rsqrt((rounded * rounded).sum() / num_columns + eps)
    norm = load(weight_ref) * (rounded * scale)
    pltriton.store(norm_ref.at[row, column], norm.astype(norm_ref.dtype), mask=mask)


@functools.partial(jax.jit, static_argnames=("eps", "num_warps", "interpret"))
def add_norm(
    parts: Float[Array, "S M N"],
    residual: Float[Array, "M N"],
    weight: Float[Array, " N"],
    *,
    eps: float,
    num_warps: int = NUM_WARPS,
    interpret: bool = False,
) -> tuple[Float[Array, "M N"], Float[Array, "M N"]]:
    """The sum and its norm; see `api.add_norm`.

    Args:
      num_warps: Warps per program.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    like = jax.ShapeDtypeStruct(residual.shape, residual.dtype)
    x, norm = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        grid=(residual.shape[0],),
        out_shape=(like, like),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=(parts.shape[0] + 4) * residual.size,
            transcendentals=0,
            bytes_accessed=4 * parts.size + 3 * residual.size * residual.dtype.itemsize,
        ),
        interpret=interpret,
        name="add_norm",
    )(parts, residual, weight)
    return x, norm
