"""Rotary position embedding, the half-rotation form of the Llama and Qwen families.

Source: Su et al., RoFormer, arXiv:2104.09864; pairing of dimensions as in transformers.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.config import RopeScaling
from pallas_kernels import rotary


class Rotation(NamedTuple):
    """Cosines and sines of every position, float32, computed once per forward."""

    cos: Float[Array, "T half"]
    sin: Float[Array, "T half"]


def rotation(
    positions: Int[Array, " T"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Rotation:
    """Angles position · frequency, their cosines and sines times YaRN's attention factor.

    Float32 throughout: in bfloat16 position 257 would round to 256, a very different angle.
    """
    rates = jnp.asarray(frequencies(head_dim, theta, scaling))
    angles = positions.astype(jnp.float32)[:, None] * rates[None, :]
    factor = 1.0 if scaling is None else scaling.attention_factor
    return Rotation(factor * jnp.cos(angles), factor * jnp.sin(angles))


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Radians per position of every pair of dimensions, float32 `[head_dim / 2]`, fastest first.

    Without scaling theta^(-2i / head_dim).
    """
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is None:
        rates = plain
    elif scaling.kind == "linear":
        rates = plain / scaling.factor
    elif scaling.kind == "llama3":
        rates = _mix(plain, scaling.factor, _llama3_kept(plain, scaling))
    else:
        rates = _mix(plain, scaling.factor, _yarn_kept(head_dim, theta, scaling))
    return rates.astype(np.float32)


def _mix(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Frequencies between their own value, where `kept` is 1, and a slowed one, where it is 0."""
    return plain * kept + plain / factor * (1 - kept)


def _llama3_kept(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Keeps what turns often within the original context, slows what turns seldom.

    Source: Llama 3.1; `_compute_llama3_parameters` of transformers.
    """
    turns = scaling.original_context_len * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns - low) / (high - low), 0, 1)


def _yarn_kept(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """As for Llama 3, but linear in the dimension.

    Source: Peng et al., YaRN, arXiv:2309.00071; `_compute_yarn_parameters` of transformers.
    """

    def pair_with(turns: float) -> float:
        """Index of the pair that turns so often within the original context."""
        period = scaling.original_context_len / (2 * math.pi * turns)
        return head_dim * math.log(period) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # as transformers: a step where both ends meet
    return 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)


def rotate(x: Float[Array, "T N H"], angles: Rotation) -> Float[Array, "T N H"]:
    """Rotates the pairs (i, i + H/2) of every head."""
    return rotary.rotate(x, *angles)
