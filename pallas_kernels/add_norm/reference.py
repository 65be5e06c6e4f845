"""The sum and its norm in plain jnp: the meaning of the op."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fused_linear.reference import rms_norm


def add_norm(
    parts: Float[Array, "S M N"],
    residual: Float[Array, "M N"],
    weight: Float[Array, " N"],
    *,
    eps: float,
) -> tuple[Float[Array, "M N"], Float[Array, "M N"]]:
    """See `api.add_norm`."""
    x = (residual.astype(jnp.float32) + parts.sum(axis=0)).astype(residual.dtype)
    return x, rms_norm(x, weight, eps)
