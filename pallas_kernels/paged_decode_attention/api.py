"""RoPE, KV write and attention of one new token per row: the op that callers use."""

import functools

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, paging
from pallas_kernels.paged_decode_attention import reference, triton

IMPLEMENTATIONS = {
    "reference": reference.paged_decode_attention,
    "triton": triton.paged_decode_attention,
    "triton_interpret": functools.partial(triton.paged_decode_attention, interpret=True),
}


def paged_decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "B P"],
    kv_lens: Int[Array, " B"],
    *,
    scale: float,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B N H"], Float[Array, "pages 2 K page_size H"]]:
    """Appends one token to each row and attends its query to the row's `kv_lens` tokens.

    Query and key are rotated by the row's angles first. Key and value go to the place of position
    `kv_lens - 1`; give `kv_pages` away (donate it), and nothing is copied. Accumulates in float32;
    float32 inputs are multiplied as float32.

    Args:
      q: One query token per row. Query heads that share a kv head are adjacent.
      k: Its key.
      v: Its value.
      cos: Cosines of the row's angles, float32; pair i of a head is (i, i + H / 2).
      sin: Sines.
      kv_pages: The cache of one layer; see `paging`. What lies past a row's length is not read
        into the result, whatever it holds.
      page_table: Page ids in the order of positions; entries past the row's length must be
        valid ids (0 is usual). It may be wide: Triton does no work for what a row does not use.
      kv_lens: Tokens of each row, the new one included, at most `P * page_size`. A row of length 0
        costs nothing, gives zeros, and changes at most page 0.
      scale: Multiplies the scores, in float32; above 0.
      implementation: "reference", "triton" or "triton_interpret"; None takes the best one for
        the current backend.

    Returns:
      What each query found, in `q`'s dtype, and the cache with the new tokens.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The implementation that was asked for cannot serve these shapes.
    """
    paging.check_query_and_cache(q, kv_pages, scale)
    paging.check_new_tokens(q, k, v, cos, sin, kv_pages)
    paging.check_int32("page_table", page_table, (q.shape[0], None))
    paging.check_int32("kv_lens", kv_lens, (q.shape[0],))
    return dispatch.call(
        "paged_decode_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        k,
        v,
        cos,
        sin,
        kv_pages,
        page_table,
        kv_lens,
        scale=scale,
    )
