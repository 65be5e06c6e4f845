"""Ragged prefill attention in plain jnp: the meaning of the op, and its path on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paging import gather_tokens
from pallas_kernels.ragged_prefill_attention.blocks import query_blocks

_BLOCK_Q = 32
_CHUNK_TOKENS = 128  # keys and values of a chunk stay in a CPU's cache
_MASKED = -1e30  # finite, so that a row that sees nothing of a chunk gives no NaN


@functools.partial(jax.jit, static_argnames="scale")
def ragged_prefill_attention(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "R P"],
    q_starts: Int[Array, " R+1"],
    kv_lens: Int[Array, " R"],
    *,
    scale: float,
) -> Float[Array, "T N H"]:
    """Attends block after block of one row's queries; see `api.ragged_prefill_attention`.

    A block walks its row's pages chunk by chunk with an online softmax and stops where its last
    query does: on a CPU that is two to five times as fast as whole rows with a mask.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2:4]
    chunk_pages = -(-_CHUNK_TOKENS // page_size)
    chunk_tokens = chunk_pages * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % chunk_pages)))
    blocks = query_blocks(q_starts, kv_lens, num_tokens, _BLOCK_Q)

    def attend_block(block):
        row, begin, end, kv_end = block
        token = begin + jnp.arange(_BLOCK_Q)
        q_position = (kv_end - end + token)[:, None]
        q_block = q[jnp.minimum(token, num_tokens - 1)].astype(jnp.float32)
        q_block = q_block.reshape(_BLOCK_Q, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)

        def attend_chunk(chunk, carry):
            row_max, row_sum, acc = carry
            pages = jax.lax.dynamic_slice(page_table, (row, chunk * chunk_pages), (1, chunk_pages))
            position = chunk * chunk_tokens + jnp.arange(chunk_tokens)
            is_token = position < kv_end
            k, v = gather_tokens(kv_pages, pages[0], is_token)
            scores = scale * jnp.einsum("kgqh,kth->kgqt", q_block, k, precision="highest")
            scores = jnp.where((position <= q_position) & is_token, scores, _MASKED)
            new_max = jnp.maximum(row_max, scores.max(axis=-1))
            weights = jnp.exp(scores - new_max[..., None])
            rescale = jnp.exp(row_max - new_max)
            acc *= rescale[..., None]
            acc += jnp.einsum("kgqt,kth->kgqh", weights, v, precision="highest")
            return new_max, row_sum * rescale + weights.sum(axis=-1), acc

        stats = jnp.zeros(q_block.shape[:-1])
        num_chunks = (kv_end + chunk_tokens - 1) // chunk_tokens
        _, row_sum, acc = jax.lax.fori_loop(
            0, num_chunks, attend_chunk, (stats + _MASKED, stats, jnp.zeros(q_block.shape))
        )
        out = acc / jnp.where(row_sum > 0, row_sum, 1.0)[..., None]
        return out.transpose(2, 0, 1, 3).reshape(_BLOCK_Q, num_heads, head_dim)

    out = jax.lax.map(attend_block, blocks).reshape(-1, num_heads, head_dim)
    token = blocks.begin[:, None] + jnp.arange(_BLOCK_Q)
    token = jnp.where(token < blocks.end[:, None], token, num_tokens).reshape(-1)
    return jnp.zeros_like(q).at[token].set(out.astype(q.dtype), mode="drop")
