"""The kernel of `rows` once more, in the Triton language, through jax-triton.

For the day when JAX drops its Pallas Triton backend, and as the way to what Pallas cannot say. The
arithmetic and the tiles are those of `rows`.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from pallas_kernels.fused_linear import triton
from pallas_kernels.fused_linear.kernel_call import Glu
from pallas_kernels.fused_linear.tuning import RowConfig, find_config


def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    norm_weight: Float[Array, " K"] | None = None,
    bias: Float[Array, " W"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    eps: float = 0.0,
    glu: Glu | None = None,
    config: RowConfig | None = None,
) -> Float[Array, "M N"]:
    """Multiplies `x` by a weight, with what comes before and after; see `api.fused_linear`.

    Raises:
      NotImplementedError: jax-triton is not installed, the gate is not `jax.nn.silu`, or there
        are more rows than the row kernel takes.
    """
    jax_triton, kernel = _load()
    if glu not in (None, jax.nn.silu):
        raise NotImplementedError(f"the gate of a gated unit is jax.nn.silu here, not {glu}")
    chosen = config or find_config(x, weight, is_gated=glu is not None)
    if not isinstance(chosen, RowConfig):
        raise NotImplementedError(triton.why_not(x, weight))
    num_rows, depth = x.shape
    num_columns = weight.shape[0] // (1 if glu is None else 2)
    neighbours = dict(norm=norm_weight, bias=bias, residual=residual)
    return jax_triton.triton_call(
        x,
        weight,
        *(x if array is None else array for array in neighbours.values()),
        kernel=kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), x.dtype),
        grid=(num_rows, -(-num_columns // chosen.block_n)),
        num_warps=chosen.num_warps,
        num_stages=1,
        **{f"HAS_{name.upper()}": array is not None for name, array in neighbours.items()},
        IS_GATED=glu is not None,
        EPS=eps,
        DEPTH=depth,
        NUM_COLUMNS=num_columns,
        BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k,
    )


@functools.cache
def _load() -> tuple[Any, Any]:
    """jax-triton, and the kernel, which cannot be defined without Triton."""
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]

        from pallas_kernels.fused_linear.kernel_language import kernel
    except ImportError as error:
        raise NotImplementedError(
            f"jax-triton is missing ({error}); install `jaxengine[cuda13]`"
        ) from error
    return jax_triton, kernel
