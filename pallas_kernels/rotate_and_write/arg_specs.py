"""Named shapes of rotation and write: what tests, deviceless compiles and benchmarks run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.random_args import (
    DEMO,
    MULTI_QUERY,
    QWEN_0_5B,
    QWEN_7B,
    SMALL,
    Heads,
    random_normal,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One setting of the op.

    Attributes:
      name: Model or trait, then the tokens.
      heads: Head counts of the model.
      num_tokens: Packed tokens, padding included.
      num_padding: Tokens of no row, at the end.
      page_size: Tokens of a page.
    """

    name: str
    heads: Heads
    num_tokens: int
    num_padding: int = 0
    page_size: int = 16

    @property
    def num_pages(self) -> int:
        return 4 + self.num_tokens // self.page_size

    def shapes(self, dtype: jax.typing.DTypeLike) -> list[jax.ShapeDtypeStruct]:
        """Returns abstract arguments of the op."""
        heads, tokens = self.heads, (self.num_tokens,)
        kv_shape = (*tokens, heads.num_kv_heads, heads.head_dim)
        cache = (self.num_pages, 2, heads.num_kv_heads, self.page_size, heads.head_dim)
        return [
            jax.ShapeDtypeStruct((*tokens, heads.num_heads, heads.head_dim), dtype),
            *[jax.ShapeDtypeStruct(kv_shape, dtype)] * 2,
            *[jax.ShapeDtypeStruct((*tokens, heads.head_dim // 2), jnp.float32)] * 2,
            jax.ShapeDtypeStruct(cache, dtype),
            *[jax.ShapeDtypeStruct(tokens, jnp.int32)] * 2,
        ]

    def arrays(self, dtype: jax.typing.DTypeLike, seed: int) -> tuple[jax.Array, ...]:
        """Returns random arguments of the op; the cache is NaN, tokens go to places of their own.

        Padding goes to the null page.
        """
        q, k, v, cos, _, cache, *_ = self.shapes(dtype)
        rng = np.random.default_rng(seed)
        places = rng.permutation((self.num_pages - 1) * self.page_size)[: self.num_tokens]
        pages, offsets = 1 + places // self.page_size, places % self.page_size
        pages[self.num_tokens - self.num_padding :] = 0
        angles = rng.uniform(0, 6.28, cos.shape)
        new = (random_normal(seed + i, x.shape) for i, x in enumerate((q, k, v)))
        return (
            *(jnp.asarray(x, dtype) for x in new),
            jnp.asarray(np.cos(angles), jnp.float32),
            jnp.asarray(np.sin(angles), jnp.float32),
            jnp.full(cache.shape, jnp.nan, dtype),
            jnp.asarray(pages, jnp.int32),
            jnp.asarray(offsets, jnp.int32),
        )


ARG_SPECS = (
    ArgSpec(name="qwen2.5-0.5b-t8192", heads=QWEN_0_5B, num_tokens=8192),
    ArgSpec(name="qwen2.5-0.5b-t64", heads=QWEN_0_5B, num_tokens=64, num_padding=32),
    ArgSpec(name="qwen2.5-7b-t8192", heads=QWEN_7B, num_tokens=8192, num_padding=100),
    ArgSpec(name="demo-t50", heads=DEMO, num_tokens=50, num_padding=7, page_size=8),
    ArgSpec(name="multi-query-t1", heads=MULTI_QUERY, num_tokens=1),
    ArgSpec(name="small-heads-t70", heads=SMALL, num_tokens=70, page_size=4),
)
