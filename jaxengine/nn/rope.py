"""Rotary position embedding, the half-rotation form of the Llama and Qwen families.

Source: Su et al., RoFormer, arXiv:2104.09864; pairing of dimensions as in transformers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosines and sines of every position, float32, computed once per forward."""

    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]


def rotation(positions: Int[Array, " T"], head_dim: int, theta: float) -> Rotation:
    """Angles position · theta^(-2i / head_dim).

    Float32 throughout: in bfloat16 position 257 would round to 256, a very different angle.
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[:, None] * (theta**-exponents)[None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "T N H"], angles: Rotation) -> Float[Array, "T N H"]:
    """Rotates the pairs (i, i + H/2) of every head."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = angles.cos[:, None, :], angles.sin[:, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
