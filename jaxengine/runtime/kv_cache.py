"""The paged KV cache: one array per layer, allocated once, donated, written in place."""

import jax
import jax.numpy as jnp

from jaxengine.config import ModelConfig

MAX_ELEMENTS = 2**31 - 1
"""Kernels index a layer's pages with 32-bit integers."""


def kv_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    """[pages, 2, K, page_size, H]; 0 and 1 on the second axis are keys and values.

    A head's tokens of a page are contiguous, which is what a kernel reads at a time.
    """
    return (num_pages, 2, config.num_kv_heads, page_size, config.head_dim)


def abstract_kv_cache(
    config: ModelConfig,
    num_pages: int,
    page_size: int,
    dtype: jnp.dtype,
    sharding: jax.sharding.Sharding,
) -> list[jax.ShapeDtypeStruct]:
    """Shapes of the cache, a page array per layer."""
    shape = kv_shape(config, num_pages, page_size)
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)] * config.num_layers


def max_num_pages(config: ModelConfig, page_size: int) -> int:
    """Most pages a layer's array may have."""
    return MAX_ELEMENTS // (2 * config.num_kv_heads * page_size * config.head_dim)
