"""The weight product with its neighbours in Pallas Triton: one kernel for a row or a few, one for
tens to hundreds of rows; see `rows` and `tiles`."""

import functools

import jax
from jaxtyping import Array, Float

from pallas_kernels.fused_linear import rows, tiles
from pallas_kernels.fused_linear.kernel_call import Glu, Neighbours
from pallas_kernels.fused_linear.tuning import RowConfig, TileConfig, find_config


@functools.partial(jax.jit, static_argnames=("eps", "glu", "config", "interpret"))
def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    norm_weight: Float[Array, " K"] | None = None,
    bias: Float[Array, " W"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    eps: float = 0.0,
    glu: Glu | None = None,
    config: RowConfig | TileConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """Multiplies `x` by a weight, with what comes before and after; see `api.fused_linear`.

    Args:
      config: Which kernel, and its tiles; None takes those of `tuning`.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    chosen = config or find_config(x, weight, is_gated=glu is not None)
    neighbours = Neighbours(norm_weight, bias, residual)
    if isinstance(chosen, RowConfig):
        return rows.call(
            x, weight, neighbours, eps=eps, glu=glu, config=chosen, interpret=interpret
        )
    if not isinstance(chosen, TileConfig) or glu is not None:
        raise NotImplementedError(why_not(x, weight))
    return tiles.call(x, weight, neighbours, eps=eps, config=chosen, interpret=interpret)


def why_not(x: jax.Array, weight: jax.Array) -> str:
    """Why there are no tiles for these shapes."""
    return f"{x.shape[0]} rows of {x.dtype} times {weight.shape}: a plain product is faster"
