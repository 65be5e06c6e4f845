"""A weight product with what comes before and after it: the op that callers use."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.fused_linear import jax_triton, mosaic, reference, tiles, triton, tuning
from pallas_kernels.fused_linear.kernel_call import Glu

IMPLEMENTATIONS = {
    "reference": reference.fused_linear,
    "triton": triton.fused_linear,
    "jax_triton": jax_triton.fused_linear,
    "mosaic": mosaic.fused_linear,
    "triton_interpret": functools.partial(triton.fused_linear, interpret=True),
}


def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    *,
    norm_weight: Float[Array, " K"] | None = None,
    eps: float = 0.0,
    bias: Float[Array, " W"] | None = None,
    glu: Glu | None = None,
    residual: Float[Array, "M N"] | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "M N"]:
    """Computes `residual + glu(gate) * up`, where `[gate, up] = norm(x) @ weight.T + bias`.

    Every part but the product may be left out; without `glu` the product is all there is between
    the bias and the residual. Accumulates in float32 and returns `x`'s dtype. The same arguments
    give the same bits in every run.

    Args:
      x: One row per token.
      weight: [out, in]. With `glu` the rows of the gate, then as many of what it gates: W = 2 N.
      norm_weight: Weight of a root mean square norm of `x`.
      eps: Of the norm.
      bias: Added to the product.
      glu: Activation of the gate, for example `jax.nn.silu`.
      residual: Added last.
      implementation: "reference", "triton", "jax_triton", "mosaic" or "triton_interpret"; None
        takes the kernel that is faster for these shapes on a GPU, and else the reference.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The implementation that was asked for cannot serve these arguments.
    """
    _check(x, weight, norm_weight, bias, glu, residual)
    config = tuning.find_config(x, weight, is_gated=glu is not None)
    if implementation is None and config is None:
        implementation = "reference"
    return dispatch.call(
        "fused_linear",
        IMPLEMENTATIONS,
        implementation,
        x,
        weight,
        norm_weight,
        bias,
        residual,
        eps=eps,
        glu=glu,
        on_gpu="mosaic" if isinstance(config, tuning.ManyRowsConfig) else "triton",
    )


PARTS_IMPLEMENTATIONS = {
    "reference": reference.parts,
    "triton": tiles.parts,
    "triton_interpret": functools.partial(tiles.parts, interpret=True),
}


def product_parts(
    x: Float[Array, "M K"],
    weight: Float[Array, "N K"],
    *,
    num_parts: int,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "S M N"]:
    """Cuts the depth of `x @ weight.T` into `num_parts` products, which are left to be added up.

    Args:
      x: One row per token.
      weight: [out, in].
      num_parts: A divisor of the depth.
      implementation: "reference", "triton" or "triton_interpret"; None takes the kernel where it
        is faster on a GPU, and else the reference.

    Returns:
      The parts, in float32. The same arguments give the same bits in every run.

    Raises:
      ValueError: Shapes do not fit together.
      NotImplementedError: The implementation that was asked for cannot serve these arguments.
    """
    if x.shape[1] != weight.shape[1] or x.shape[1] % num_parts:
        raise ValueError(
            "`x` [rows, in] and `weight` [out, in] must have a depth that `num_parts` divides. Got "
            f"{x.shape}, {weight.shape} and {num_parts}."
        )
    if implementation is None and tuning.find_parts_config(x) is None:
        implementation = "reference"
    return dispatch.call(
        "product_parts", PARTS_IMPLEMENTATIONS, implementation, x, weight, num_parts=num_parts
    )


def is_faster(
    x: jax.Array,
    weight: jax.Array,
    *,
    is_gated: bool,
    implementation: dispatch.Implementation | None = None,
) -> bool:
    """Whether a kernel, of `implementation` if given, beats a plain product on a GPU."""
    config = tuning.find_config(x, weight, is_gated=is_gated)
    if isinstance(config, tuning.ManyRowsConfig):
        return implementation in (None, "mosaic")
    return config is not None and implementation != "mosaic"


def _check(
    x: jax.Array,
    weight: jax.Array,
    norm_weight: jax.Array | None,
    bias: jax.Array | None,
    glu: Glu | None,
    residual: jax.Array | None,
) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "`x` must be [rows, in] and `weight` [out, in]. Got the shapes "
            f"{x.shape} and {weight.shape}."
        )
    if glu is not None and weight.shape[0] % 2:
        raise ValueError(
            f"With `glu` the rows of `weight` must be even in number. Got {weight.shape[0]}."
        )
    num_columns = weight.shape[0] if glu is None else weight.shape[0] // 2
    wanted = dict(
        norm_weight=(norm_weight, (x.shape[1],)),
        bias=(bias, (weight.shape[0],)),
        residual=(residual, (x.shape[0], num_columns)),
    )
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"`{name}` must have the shape {shape}. Got {array.shape}.")
    dtypes = {a.dtype for a in (x, weight, residual) if a is not None}
    if len(dtypes) > 1 or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            "`x`, `weight` and `residual` must all be bfloat16, float16 or float32. Got "
            f"{sorted(map(str, dtypes))}."
        )
