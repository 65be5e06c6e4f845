"""The weight product with its neighbours in plain jnp: its meaning, and its path for many rows."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*T D"], weight: Float[Array, " D"], eps: float
) -> Float[Array, "*T D"]:
    """Root mean square norm of the last axis, computed in float32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467.
    """
    x_f32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    return (weight.astype(jnp.float32) * (x_f32 * scale)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("eps", "glu"))
def fused_linear(
    x: Float[Array, "M K"],
    weight: Float[Array, "W K"],
    norm_weight: Float[Array, " K"] | None = None,
    bias: Float[Array, " W"] | None = None,
    residual: Float[Array, "M N"] | None = None,
    *,
    eps: float = 0.0,
    glu: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "M N"]:
    """One operation after another, each rounded to `x.dtype`; see `api.fused_linear`."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    # float32 means float32: without this a GPU would multiply in tf32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    contract_last = (((1,), (1,)), ((), ()))
    # A product accumulates in float32 whatever it gives; one in float32 would be written as such
    # and rounded by a kernel of its own.
    out = jax.lax.dot_general(
        x, weight, contract_last, precision=precision, preferred_element_type=x.dtype
    )
    if bias is not None:
        out = out + bias
    if glu is not None:
        gate, up = jnp.split(out, 2, axis=-1)
        out = glu(gate) * up
    return out if residual is None else residual + out


def parts(
    x: Float[Array, "M K"], weight: Float[Array, "N K"], *, num_parts: int
) -> Float[Array, "S M N"]:
    """The parts as one more axis of the product; see `api.product_parts`."""
    return jax.lax.dot_general(
        x.reshape(len(x), num_parts, -1),
        weight.reshape(len(weight), num_parts, -1),
        (((2,), (2,)), ((1,), (1,))),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
