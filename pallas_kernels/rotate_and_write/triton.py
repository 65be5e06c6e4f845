"""Rotation and write as one Pallas Triton kernel: a program takes a head of some tokens.

Queries go to the result, keys and values to their pages; XLA takes a kernel for the rotation and a
scatter, which reads its indices for every element.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.triton_math import check_head_dim

_BLOCK_ELEMENTS = 4096
"""Elements of a program: tokens times head dimension."""


def _kernel(
    qkv_ref,  # [T, N + 2 K, H], not rotated
    cos_ref,  # [T, H / 2]
    sin_ref,  # [T, H / 2]
    kv_ref,  # [pages * 2 * K * page_size, H]; only its alias is written
    pages_ref,  # [T]
    offsets_ref,  # [T]
    out_ref,  # [T, N, H]
    new_kv_ref,  # the cache again
    *,
    block_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
):
    num_tokens, _, head_dim = qkv_ref.shape
    head = pl.program_id(0)
    token = pl.program_id(1) * block_tokens + jnp.arange(block_tokens)
    is_token = (token < num_tokens)[:, None]
    dims = jnp.arange(head_dim)[None, :]
    half = head_dim // 2

    def load(ref, *where):
        return pltriton.load(ref.at[(token[:, None], *where)], mask=is_token, other=0.0)

    own = load(qkv_ref, head, dims)
    is_value = head >= num_heads + num_kv_heads

    def rotated() -> jax.Array:
        cos, sin = load(cos_ref, dims % half), load(sin_ref, dims % half)
        partner = load(qkv_ref, head, (dims + half) % head_dim).astype(jnp.float32)
        turned = own.astype(jnp.float32) * cos + partner * jnp.where(dims < half, -sin, sin)
        return turned.astype(own.dtype)

    def write(x: jax.Array, first_row: jax.Array) -> None:
        page = pltriton.load(pages_ref.at[token], mask=token < num_tokens, other=0)
        offset = pltriton.load(offsets_ref.at[token], mask=token < num_tokens, other=0)
        row = (page * (2 * num_kv_heads) + first_row) * page_size + offset
        pltriton.store(new_kv_ref.at[row[:, None], dims], x, mask=is_token)

    @pl.when(head < num_heads)
    def _query():
        pltriton.store(out_ref.at[token[:, None], head, dims], rotated(), mask=is_token)

    @pl.when((head >= num_heads) & ~is_value)
    def _key():
        write(rotated(), head - num_heads)

    @pl.when(is_value)
    def _value():
        write(own, head - num_heads)


@functools.partial(jax.jit, static_argnames="interpret")
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
    interpret: bool = False,
) -> tuple[Float[Array, "T N H"], Float[Array, "pages 2 K page_size H"]]:
    """Rotates and writes; see `api.rotate_and_write`.

    Args:
      interpret: Run in the Pallas interpreter, on any backend.
    """
    num_tokens, num_heads, head_dim = q.shape
    check_head_dim(head_dim)
    num_kv_heads, page_size = kv_pages.shape[2:4]
    block_tokens = min(_BLOCK_ELEMENTS // head_dim, pl.next_power_of_2(num_tokens))
    # Parts of one projection are one array again: XLA drops the cut and the glue.
    qkv = jnp.concatenate([q, k, v], axis=1)
    flat = kv_pages.reshape(-1, head_dim)
    out, flat = pl.pallas_call(
        functools.partial(
            _kernel,
            block_tokens=block_tokens,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            page_size=page_size,
        ),
        grid=(num_heads + 2 * num_kv_heads, pl.cdiv(num_tokens, block_tokens)),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, flat)],
        input_output_aliases={3: 1},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=4 * qkv.size,
            transcendentals=0,
            bytes_accessed=2 * qkv.size * qkv.dtype.itemsize + 8 * cos.size,
        ),
        interpret=interpret,
        name="rotate_and_write",
    )(qkv, cos, sin, flat, write_pages, write_offsets)
    return out, flat.reshape(kv_pages.shape)
