"""The largest entries of rows short enough for one program each: the op that callers use."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.top_k import reference, triton

IMPLEMENTATIONS = {
    "reference": reference.top_k,
    "triton": triton.top_k,
    "triton_interpret": functools.partial(triton.top_k, interpret=True),
}


def top_k(
    x: Float[Array, "B n"],
    *,
    count: int,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B count"], Int[Array, "B count"]]:
    """Finds the largest entries of each row and their places.

    In order, the lowest place first among equals. XLA sorts the rows for a `count` above 16.

    Args:
      x: The rows. Where there is NaN the result is some places of the row.
      count: How many; at most the length of a row.
      implementation: "reference", "triton" or "triton_interpret"; None takes the best one for
        the current backend.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The implementation that was asked for cannot serve these shapes.
    """
    if x.ndim != 2 or x.dtype != jnp.float32:
        raise ValueError(f"`x` must be float32 [B, n]. Got {x.dtype}{x.shape}.")
    if not 1 <= count <= x.shape[1]:
        raise ValueError(f"`count` must be 1 to {x.shape[1]}, the length of a row. Got {count}.")
    return dispatch.call("top_k", IMPLEMENTATIONS, implementation, x, count=count)
