"""Parts of a product added to the residual stream, and the norm of the sum: the op callers use."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.add_norm import reference, triton

IMPLEMENTATIONS = {
    "reference": reference.add_norm,
    "triton": triton.add_norm,
    "triton_interpret": functools.partial(triton.add_norm, interpret=True),
}


def add_norm(
    parts: Float[Array, "S M N"],
    residual: Float[Array, "M N"],
    weight: Float[Array, " N"],
    *,
    eps: float,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "M N"], Float[Array, "M N"]]:
    """Computes `x = residual + sum(parts)` and its root mean square norm.

    Args:
      parts: In float32; of a product whose depth was cut.
      residual: In the activations' dtype.
      weight: Of the norm.
      eps: Of the norm.
      implementation: "reference", "triton" or "triton_interpret"; None takes the best one of the
        current backend.

    Returns:
      `x`, rounded to the dtype of `residual`, and the norm of what was rounded.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
    """
    if parts.ndim != 3 or parts.shape[1:] != residual.shape or parts.dtype != jnp.float32:
        raise ValueError(
            "`parts` must be float32 [parts, rows, columns] for a `residual` [rows, columns]. "
            f"Got {parts.dtype}{parts.shape} and {residual.shape}."
        )
    if weight.shape != residual.shape[1:]:
        raise ValueError(f"`weight` must be {residual.shape[1:]}. Got {weight.shape}.")
    return dispatch.call(
        "add_norm", IMPLEMENTATIONS, implementation, parts, residual, weight, eps=eps
    )


MAX_ROWS = 512
MAX_COLUMNS = 2048
"""Wider results have tiles enough as they are."""

MIN_DEPTH = 256
"""Least depth of a part: less is over before its loads have come."""


def num_parts(x: jax.Array, weight: jax.Array) -> int:
    """Parts into which to cut the depth of `x @ weight.T` on a GPU; 1 where that does not pay.

    With few rows a deep weight has too few tiles to occupy a GPU, so XLA cuts the depth and adds
    the parts up in a second kernel. Where that kernel also makes the norm that follows, a layer has
    one kernel less. Down of the Qwen2.5-0.5B shape, 4864 -> 896, with residual and norm, on one
    H200 (driver 580, jax 0.11.2), us: as XLA does it, in eight parts, in four, all by XLA. Between
    33 and 128 rows the tile kernel makes the parts, and is fastest with four; see `fused_linear`.

    | 16 rows | 64 | 256 |
    |---|---|---|
    | 12.2, 9.9, 12.5 | 11.1, 10.7, 14.4 | 15.3, 13.9, 12.5 |

    Args:
      x: [rows, depth].
      weight: [columns, depth].
    """
    (num_rows, depth), num_columns = x.shape, weight.shape[0]
    is_served = x.dtype == jnp.bfloat16 and num_rows <= MAX_ROWS and num_columns <= MAX_COLUMNS
    parts = 8 if num_rows <= 32 else 4
    is_cut = is_served and depth >= parts * MIN_DEPTH and depth % (32 * parts) == 0
    return parts if is_cut else 1
