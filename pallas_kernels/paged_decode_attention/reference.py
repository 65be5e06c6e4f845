"""Paged decode attention in plain jnp: the meaning of the op, and its path on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paging import gather_tokens
from pallas_kernels.rotary import rotate


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
    """Rotates, writes, gathers every row's pages and takes a masked softmax; see `api`."""
    batch, _, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2:4]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    position = jnp.maximum(kv_lens - 1, 0)
    page = jnp.take_along_axis(page_table, position[:, None] // page_size, axis=1)[:, 0]
    page = jnp.where(kv_lens > 0, page, 0)  # a dead row writes to the null page
    kv_pages = kv_pages.at[page, :, :, position % page_size].set(jnp.stack([k, v], axis=1))
    is_token = jnp.arange(page_table.shape[1] * page_size) < kv_lens[:, None]
    keys, values = gather_tokens(kv_pages, page_table, is_token)
    q_group = q.reshape(batch, num_kv_heads, -1, head_dim).astype(jnp.float32)
    scores = scale * jnp.einsum("bkgh,bkth->bkgt", q_group, keys, precision="highest")
    scores = jnp.where(is_token[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkgt,bkth->bkgh", weights, values, precision="highest")
    return out.reshape(q.shape).astype(q.dtype), kv_pages
