"""The paged KV cache as the kernels see it: argument checks and the plain gather.

One array per layer, `kv_pages: [pages, 2, K, page_size, H]`: keys at index 0 of axis 1, values at
index 1. The token at position p of a row lives in page `page_table[row, p // page_size]`, at
offset `p % page_size`. Page 0 may hold anything, and so may every place past a row's length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_query_and_cache(q: jax.Array, kv_pages: jax.Array, scale: float) -> None:
    """Raises ValueError where the queries and the cache cannot belong together."""
    if q.ndim != 3:
        raise ValueError(f"`q` must have 3 axes (tokens, heads, head_dim). Got shape {q.shape}.")
    if kv_pages.ndim != 5 or kv_pages.shape[1] != 2:
        raise ValueError(
            "`kv_pages` must have the shape (pages, 2, kv_heads, page_size, head_dim). Got "
            f"{kv_pages.shape}. Put keys and values of a layer into one array."
        )
    if q.shape[2] != kv_pages.shape[4]:
        raise ValueError(
            f"`q` and `kv_pages` must have the same head_dim. Got {q.shape[2]} and "
            f"{kv_pages.shape[4]}."
        )
    if q.shape[1] % kv_pages.shape[2]:
        raise ValueError(
            "The query heads of `q` must be a multiple of the kv heads of `kv_pages`. Got "
            f"{q.shape[1]} and {kv_pages.shape[2]}."
        )
    if q.dtype != kv_pages.dtype or q.dtype not in _DTYPES:
        raise ValueError(
            "`q` and `kv_pages` must both be bfloat16, float16 or float32. Got "
            f"{q.dtype} and {kv_pages.dtype}. Cast `q` to the cache's dtype."
        )
    if not scale > 0:
        raise ValueError(f"`scale` must be above 0. Got {scale}. Usual is head_dim ** -0.5.")


def check_new_tokens(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    kv_pages: jax.Array,
) -> None:
    """Raises ValueError where keys, values or angles do not belong to the queries."""
    num_rows, _, head_dim = q.shape
    wanted = (num_rows, kv_pages.shape[2], head_dim)
    for name, array in (("k", k), ("v", v)):
        if array.shape != wanted or array.dtype != q.dtype:
            raise ValueError(
                f"`{name}` must be {q.dtype} of the shape {wanted}. Got {array.dtype} of "
                f"{array.shape}."
            )
    for name, array in (("cos", cos), ("sin", sin)):
        if array.shape != (num_rows, head_dim // 2) or array.dtype != jnp.float32:
            raise ValueError(
                f"`{name}` must be float32 of the shape {(num_rows, head_dim // 2)}, an angle per "
                f"pair of dimensions. Got {array.dtype} of {array.shape}."
            )


def check_int32(name: str, array: jax.Array, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError unless `array` is int32 of `shape`; a None in it allows any size."""
    fits = array.ndim == len(shape) and all(
        want in (None, got) for got, want in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != jnp.int32:
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"`{name}` must be int32 of the shape ({want}). Got {array.dtype} of {array.shape}."
        )


def gather_tokens(
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "*rows P"],
    is_token: Bool[Array, "*rows tokens"],
) -> tuple[Float[Array, "*rows K tokens H"], Float[Array, "*rows K tokens H"]]:
    """Returns the keys and the values of whole pages in float32, zero where not `is_token`.

    Zeros because a place past a row's length may be NaN, which even a weight of 0 lets through.
    """

    def gather(index: int) -> jax.Array:
        pages = jnp.swapaxes(kv_pages[page_table, index], -4, -3)  # [*rows, K, P, page_size, H]
        tokens = pages.reshape(*pages.shape[:-3], -1, pages.shape[-1]).astype(jnp.float32)
        return jnp.where(is_token[..., None, :, None], tokens, 0.0)

    return gather(0), gather(1)
