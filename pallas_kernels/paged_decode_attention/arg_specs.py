"""Named shapes of paged decode attention: what tests, deviceless compiles and benchmarks run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.random_args import (
    DEMO,
    GEMMA_2_2B,
    MULTI_HEAD,
    MULTI_QUERY,
    QWEN_0_5B,
    QWEN_1_5B,
    QWEN_7B,
    QWEN_32B,
    SMALL,
    Heads,
    random_cache,
    random_lens,
    random_normal,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One setting of the op.

    Attributes:
      name: Model or trait, then the batch.
      heads: Head counts of the model.
      kv_lens: Tokens of each row; 0 is a dead row.
      pages_per_row: Width of the page table.
      page_size: Tokens of a page.
      num_pages: Pages of the pool; None for as many as the rows need.
    """

    name: str
    heads: Heads
    kv_lens: tuple[int, ...]
    pages_per_row: int
    page_size: int = 16
    num_pages: int | None = None

    @property
    def cache_elements(self) -> int:
        """Elements of keys and values that the op has to read."""
        return 2 * sum(self.kv_lens) * self.heads.num_kv_heads * self.heads.head_dim

    @property
    def flops(self) -> int:
        return 4 * sum(self.kv_lens) * self.heads.num_heads * self.heads.head_dim

    @property
    def is_small(self) -> bool:
        """Whether a CPU serves it in a moment, the page table read in full."""
        gathered = len(self.kv_lens) * self.pages_per_row * self.page_size
        return (
            gathered * self.heads.num_kv_heads * self.heads.head_dim <= 1 << 20
            and not self.num_pages
        )

    def shapes(self, dtype: jax.typing.DTypeLike) -> list[jax.ShapeDtypeStruct]:
        """Returns abstract arguments of the op."""
        batch = len(self.kv_lens)
        cache = (2, self.heads.num_kv_heads, self.page_size, self.heads.head_dim)
        num_pages = self.num_pages or 1 + batch * self.pages_per_row
        head_dim, half = self.heads.head_dim, self.heads.head_dim // 2
        new = jax.ShapeDtypeStruct((batch, self.heads.num_kv_heads, head_dim), dtype)
        angles = jax.ShapeDtypeStruct((batch, half), jnp.float32)
        return [
            jax.ShapeDtypeStruct((batch, self.heads.num_heads, head_dim), dtype),
            *(new, new, angles, angles),
            jax.ShapeDtypeStruct((num_pages, *cache), dtype),
            jax.ShapeDtypeStruct((batch, self.pages_per_row), jnp.int32),
            jax.ShapeDtypeStruct((batch,), jnp.int32),
        ]

    def arrays(self, dtype: jax.typing.DTypeLike, seed: int) -> tuple[jax.Array, ...]:
        """Returns random arguments of the op; the cache is NaN where nothing may be read.

        That includes the places of the new tokens.
        """
        kv_pages, page_table = random_cache(
            seed,
            self.kv_lens,
            heads=self.heads,
            page_size=self.page_size,
            pages_per_row=self.pages_per_row,
            num_pages=self.num_pages,
            dtype=dtype,
        )
        lens = np.asarray(self.kv_lens, np.int32)
        (live,) = np.nonzero(lens)
        page, offset = np.divmod(lens[live] - 1, self.page_size)
        new_pages = np.asarray(page_table)[live, page]
        kv_pages = kv_pages.at[new_pages, :, :, offset].set(jnp.nan)
        batch, heads = len(lens), self.heads
        shapes = [(batch, n, heads.head_dim) for n in (heads.num_heads, *[heads.num_kv_heads] * 2)]
        qkv = [jnp.asarray(random_normal(seed + 1 + i, s), dtype) for i, s in enumerate(shapes)]
        angles = jnp.asarray(4 * random_normal(seed + 4, (batch, heads.head_dim // 2)))
        return *qkv, jnp.cos(angles), jnp.sin(angles), kv_pages, page_table, jnp.asarray(lens)


ARG_SPECS = (
    ArgSpec(name="qwen2.5-0.5b-b1", heads=QWEN_0_5B, kv_lens=(1024,), pages_per_row=128),
    ArgSpec(name="qwen2.5-0.5b-b16", heads=QWEN_0_5B, kv_lens=(1024,) * 16, pages_per_row=128),
    ArgSpec(name="qwen2.5-0.5b-b64", heads=QWEN_0_5B, kv_lens=(1024,) * 64, pages_per_row=128),
    ArgSpec(name="qwen2.5-0.5b-b256", heads=QWEN_0_5B, kv_lens=(1024,) * 256, pages_per_row=64),
    ArgSpec(name="qwen2.5-0.5b-b512", heads=QWEN_0_5B, kv_lens=(1024,) * 512, pages_per_row=64),
    ArgSpec(
        name="qwen2.5-0.5b-b128-uneven",
        heads=QWEN_0_5B,
        kv_lens=random_lens(128, 100, 2048),
        pages_per_row=128,
    ),
    ArgSpec(name="qwen2.5-0.5b-b1-long", heads=QWEN_0_5B, kv_lens=(131_071,), pages_per_row=8192),
    ArgSpec(
        name="qwen2.5-0.5b-b16-wide",
        heads=QWEN_0_5B,
        kv_lens=random_lens(16, 1, 300),
        pages_per_row=8192,
        num_pages=600_000,  # above 4 GiB: offsets no longer fit 32 bits
    ),
    ArgSpec(name="qwen2.5-7b-b1", heads=QWEN_7B, kv_lens=(1000,), pages_per_row=64),
    ArgSpec(name="qwen2.5-7b-b128", heads=QWEN_7B, kv_lens=(1024,) * 128, pages_per_row=64),
    ArgSpec(
        name="qwen2.5-1.5b-b32", heads=QWEN_1_5B, kv_lens=random_lens(32, 1, 500), pages_per_row=32
    ),
    ArgSpec(
        name="qwen2.5-32b-b16", heads=QWEN_32B, kv_lens=random_lens(16, 1, 2000), pages_per_row=128
    ),
    ArgSpec(name="demo-b3", heads=DEMO, kv_lens=(5, 0, 33), pages_per_row=4),
    ArgSpec(
        name="grouped-b6-dead-and-single",
        heads=QWEN_0_5B,
        kv_lens=(0, 1, 15, 16, 17, 0),
        pages_per_row=2,
    ),
    ArgSpec(
        name="all-dead-b2",
        heads=DEMO,
        kv_lens=(0, 0),
        pages_per_row=3,
    ),
    ArgSpec(
        name="multi-head-b4-odd",
        heads=MULTI_HEAD,
        kv_lens=(77, 3, 128, 65),
        pages_per_row=9,
    ),
    ArgSpec(
        name="multi-query-b2",
        heads=MULTI_QUERY,
        kv_lens=(40, 129),
        pages_per_row=9,
    ),
    ArgSpec(
        name="small-heads-b2",
        heads=SMALL,
        kv_lens=(30, 9),
        pages_per_row=5,
        page_size=8,
    ),
    ArgSpec(
        name="gemma2-2b-b4",
        heads=GEMMA_2_2B,
        kv_lens=(200, 17, 31, 4),
        pages_per_row=13,
    ),
)
