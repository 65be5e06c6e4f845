"""Causal attention of packed ragged queries over a paged KV cache: the op that callers use."""

import functools

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, paging
from pallas_kernels.ragged_prefill_attention import reference, triton

IMPLEMENTATIONS = {
    "reference": reference.ragged_prefill_attention,
    "triton": triton.ragged_prefill_attention,
    "triton_interpret": functools.partial(triton.ragged_prefill_attention, interpret=True),
}


def ragged_prefill_attention(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "R P"],
    q_starts: Int[Array, " R+1"],
    kv_lens: Int[Array, " R"],
    *,
    scale: float,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "T N H"]:
    """Attends each query token to its row's tokens up to and including itself.

    Accumulates in float32 and returns `q`'s dtype; float32 inputs are multiplied as float32.

    Args:
      q: Query tokens of all rows, packed, after RoPE. Query heads that share a kv head are
        adjacent. Tokens past `q_starts[R]` are padding and give zeros.
      kv_pages: The cache of one layer; see `paging`. What lies past a row's length is not read
        into the result, whatever it holds.
      page_table: Page ids in the order of positions; entries past the row's length must be
        valid ids (0 is usual).
      q_starts: Row r owns the query tokens `q_starts[r]:q_starts[r + 1]`; ascending from 0. Rows
        may be empty.
      kv_lens: Tokens of each row, those of `q` included and already written; at least the row's
        query tokens, at most `P * page_size`. Query i of a row sits at position
        `kv_len - q_len + i`.
      scale: Multiplies the scores, in float32; above 0.
      implementation: "reference", "triton" or "triton_interpret"; None takes the best one for
        the current backend.

    Raises:
      ValueError: Shapes or dtypes do not fit together.
      NotImplementedError: The implementation that was asked for cannot serve these shapes.
    """
    paging.check_query_and_cache(q, kv_pages, scale)
    paging.check_int32("page_table", page_table, (None, None))
    num_rows = page_table.shape[0]
    paging.check_int32("q_starts", q_starts, (num_rows + 1,))
    paging.check_int32("kv_lens", kv_lens, (num_rows,))
    return dispatch.call(
        "ragged_prefill_attention",
        IMPLEMENTATIONS,
        implementation,
        q,
        kv_pages,
        page_table,
        q_starts,
        kv_lens,
        scale=scale,
    )
