"""Rotary position embedding, the half-rotation form of the Llama and Qwen families.

Source: Su et al., RoFormer, arXiv:2104.09864; pairing of dimensions as in transformers.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotate(
    x: Float[Array, "T N H"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]
) -> Float[Array, "T N H"]:
    """Rotates the pairs (i, i + H/2) of every head, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
