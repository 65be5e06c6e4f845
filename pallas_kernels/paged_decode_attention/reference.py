"""Paged decode attention in plain jnp: the meaning of the op, and its path on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paging import gather_tokens


@functools.partial(jax.jit, static_argnames="scale")
def paged_decode_attention(
    q: Float[Array, "B N H"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "B P"],
    kv_lens: Int[Array, " B"],
    *,
    scale: float,
) -> Float[Array, "B N H"]:
    """Gathers every row's pages and takes a masked softmax; see `api.paged_decode_attention`."""
    batch, _, head_dim = q.shape
    num_kv_heads, page_size = kv_pages.shape[2:4]
    is_token = jnp.arange(page_table.shape[1] * page_size) < kv_lens[:, None]
    k, v = gather_tokens(kv_pages, page_table, is_token)
    q_group = q.reshape(batch, num_kv_heads, -1, head_dim).astype(jnp.float32)
    scores = scale * jnp.einsum("bkgh,bkth->bkgt", q_group, k, precision="highest")
    scores = jnp.where(is_token[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkgt,bkth->bkgh", weights, v, precision="highest")
    return out.reshape(q.shape).astype(q.dtype)
