"""What several of the built-in transforms share."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

SMALLEST = float(np.nextafter(0.0, 1.0))
LARGEST = float(np.finfo(np.float32).max)


def number_in(low: float, high: float, clause: str) -> Callable[[Any], str | None]:
    """A `Param.check` for numbers in [low, high]."""

    def check(value: Any) -> str | None:
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        return None if is_number and low <= value <= high else clause

    return check


def scatter_ids(
    ids: Int[Array, "B n"], values: Array, neutral: Array, shape: tuple[int, ...]
) -> Array:
    """`neutral` [B, V] but for `values` at the given ids; -1 is padding.

    Not scattered into the logits, which are still needed and would be copied.
    """
    # Padding would wrap to the last token; past the end it is dropped.
    places = jnp.where(ids < 0, shape[-1], ids)
    rows = jnp.arange(shape[0])[:, None]
    return jnp.broadcast_to(neutral, shape).at[rows, places].set(values, mode="drop")
