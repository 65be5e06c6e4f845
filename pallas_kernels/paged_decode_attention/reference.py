"""Paged decode attention in plain jnp: the meaning of the op, and its path on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paging import gather_tokens
from pallas_kernels.rotary import rotate

_CHUNK_TOKENS = 128  # keys and values of a chunk stay in a CPU's cache
_MASKED = -1e30  # finite, so that a row that sees nothing of a chunk gives no NaN


@functools.partial(jax.jit, static_argnames="scale")
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
) -> tuple[Float[Array, "B N H"], Float[Array, "pages 2 K page_size H"]]:
    """Rotates, writes, then attends; see `api.paged_decode_attention`."""
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    page_size = kv_pages.shape[3]
    position = jnp.maximum(kv_lens - 1, 0)
    page = jnp.take_along_axis(page_table, position[:, None] // page_size, axis=1)[:, 0]
    page = jnp.where(kv_lens > 0, page, 0)  # a dead row writes to the null page
    kv_pages = kv_pages.at[page, :, :, position % page_size].set(jnp.stack([k, v], axis=1))
    return _attend(q, kv_pages, page_table, kv_lens, scale=scale), kv_pages


def _attend(
    q: Float[Array, "B N H"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "B P"],
    kv_lens: Int[Array, " B"],
    *,
    scale: float,
) -> Float[Array, "B N H"]:
    """Walks the pages of all rows chunk by chunk.

    An online softmax over the chunks, which stops where the longest row does: a wide page table
    costs nothing.
    """
    batch, _, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2:4]
    chunk_pages = -(-_CHUNK_TOKENS // page_size)
    chunk_tokens = chunk_pages * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % chunk_pages)))
    q_group = q.reshape(batch, num_kv_heads, -1, head_dim).astype(jnp.float32)

    def attend_chunk(chunk, carry):
        row_max, row_sum, acc = carry
        pages = jax.lax.dynamic_slice_in_dim(page_table, chunk * chunk_pages, chunk_pages, axis=1)
        position = chunk * chunk_tokens + jnp.arange(chunk_tokens)
        is_token = position < kv_lens[:, None]
        k, v = gather_tokens(kv_pages, pages, is_token)
        scores = scale * jnp.einsum("bkgh,bkth->bkgt", q_group, k, precision="highest")
        scores = jnp.where(is_token[:, None, None], scores, _MASKED)
        new_max = jnp.maximum(row_max, scores.max(axis=-1))
        weights = jnp.where(is_token[:, None, None], jnp.exp(scores - new_max[..., None]), 0.0)
        rescale = jnp.exp(row_max - new_max)
        acc = acc * rescale[..., None]
        acc += jnp.einsum("bkgt,bkth->bkgh", weights, v, precision="highest")
        return new_max, row_sum * rescale + weights.sum(axis=-1), acc

    stats = jnp.zeros(q_group.shape[:-1])
    num_chunks = (kv_lens.max() + chunk_tokens - 1) // chunk_tokens
    _, row_sum, acc = jax.lax.fori_loop(
        0, num_chunks, attend_chunk, (stats + _MASKED, stats, jnp.zeros(q_group.shape))
    )
    out = acc / jnp.where(row_sum > 0, row_sum, 1.0)[..., None]
    return out.reshape(q.shape).astype(q.dtype)
