"""The largest threshold for which a predicate holds, found bit by bit: plain jnp, no sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

_SIGN = 1 << 31


def ordered(x: Float[Array, "*B V"]) -> UInt[Array, "*B V"]:
    """Unsigned integers in the order of the floats: sign-magnitude made two's complement."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(_SIGN)
    return jnp.where(bits & sign, ~bits, bits | sign)


def unordered(keys: UInt[Array, "*B"]) -> Float[Array, "*B"]:
    """The floats that `ordered` made integers of."""
    sign = jnp.uint32(_SIGN)
    return jax.lax.bitcast_convert_type(jnp.where(keys & sign, keys ^ sign, ~keys), jnp.float32)


def largest_threshold(
    hold: Callable[[UInt[Array, " B"]], Bool[Array, " B"]], num_rows: int
) -> UInt[Array, " B"]:
    """The largest thresholds for which a monotone predicate holds, in 32 evaluations of it.

    Args:
      hold: Thresholds, one a row, -> whether it holds for each; true below, false above.
      num_rows: Rows.

    Returns:
      The thresholds, as `ordered` integers; 0 where it holds for none.
    """

    def try_bit(i: Int[Array, ""], found: UInt[Array, " B"]) -> UInt[Array, " B"]:
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(hold(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros(num_rows, jnp.uint32))
