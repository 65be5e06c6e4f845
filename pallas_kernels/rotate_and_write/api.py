"""Rotates packed new tokens and writes their keys and values to pages: the op that callers use."""

import functools

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, paging
from pallas_kernels.rotate_and_write import reference, triton

IMPLEMENTATIONS = {
    "reference": reference.rotate_and_write,
    "triton": triton.rotate_and_write,
    "triton_interpret": functools.partial(triton.rotate_and_write, interpret=True),
}


def rotate_and_write(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    write_pages: Int[Array, " T"],
    write_offsets: Int[Array, " T"],
    *,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "pages 2 K page_size H"]]:
    """Rotates the pairs (i, i + H/2) of queries and keys, and writes keys and values.

    Args:
      q: Queries of the new tokens, not rotated.
      k: Their keys, not rotated.
      v: Their values.
      cos: Cosine of every token's angle for every pair of dimensions, float32.
      sin: Likewise.
      kv_pages: The cache of one layer; see `paging`.
      write_pages: Page of every token. Tokens of no row share the null page.
      write_offsets: Place of every token inside its page, in [0, page_size).
      implementation: "reference", "triton" or "triton_interpret"; None takes the best one for
        the current backend.

    Returns:
      The queries rotated, and the cache with the tokens written.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The implementation that was asked for cannot serve these shapes.
    """
    paging.check_query_and_cache(q, kv_pages, 1.0)
    paging.check_new_tokens(q, k, v, cos, sin, kv_pages)
    paging.check_int32("write_pages", write_pages, q.shape[:1])
    paging.check_int32("write_offsets", write_offsets, q.shape[:1])
    args: tuple[jax.Array, ...] = (q, k, v, cos, sin, kv_pages, write_pages, write_offsets)
    return dispatch.call("rotate_and_write", IMPLEMENTATIONS, implementation, *args)
