"""Named shapes of ragged prefill attention: what tests, deviceless compiles and benchmarks run."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
      name: Model or trait, then the rows.
      heads: Head counts of the model.
      q_lens: Query tokens of each row; 0 is an empty row.
      cached_lens: Tokens of each row that were written before these; () for none.
      num_tokens: Packed tokens with the padding; None for no padding.
      pages_per_row: Width of the page table.
      page_size: Tokens of a page.
    """

    name: str
    heads: Heads
    q_lens: tuple[int, ...]
    cached_lens: tuple[int, ...] = ()
    num_tokens: int | None = None
    pages_per_row: int
    page_size: int = 16

    @property
    def kv_lens(self) -> tuple[int, ...]:
        cached_lens = self.cached_lens or (0,) * len(self.q_lens)
        return tuple(q + cached for q, cached in zip(self.q_lens, cached_lens, strict=True))

    @property
    def packed_tokens(self) -> int:
        return self.num_tokens or sum(self.q_lens)

    @property
    def flops(self) -> int:
        """Operations of the visible scores alone: a causal kernel need not do more."""
        visible = sum(
            q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True)
        )
        return 4 * visible * self.heads.num_heads * self.heads.head_dim

    @property
    def is_small(self) -> bool:
        """Whether a CPU serves it in a moment."""
        return self.flops <= 1 << 25

    def shapes(self, dtype: jax.typing.DTypeLike) -> list[jax.ShapeDtypeStruct]:
        """Returns abstract arguments of the op."""
        num_rows = len(self.q_lens)
        num_pages = 1 + num_rows * self.pages_per_row
        cache = (2, self.heads.num_kv_heads, self.page_size, self.heads.head_dim)
        return [
            jax.ShapeDtypeStruct(
                (self.packed_tokens, self.heads.num_heads, self.heads.head_dim), dtype
            ),
            jax.ShapeDtypeStruct((num_pages, *cache), dtype),
            jax.ShapeDtypeStruct((num_rows, self.pages_per_row), jnp.int32),
            jax.ShapeDtypeStruct((num_rows + 1,), jnp.int32),
            jax.ShapeDtypeStruct((num_rows,), jnp.int32),
        ]

    def arrays(
        self, dtype: jax.typing.DTypeLike, seed: int
    ) -> tuple[
        Float[Array, "T N H"],
        Float[Array, "pages 2 K page_size H"],
        Int[Array, "R P"],
        Int[Array, " R+1"],
        Int[Array, " R"],
    ]:
        """Returns random arguments of the op; the cache is NaN where nothing may be read."""
        kv_pages, page_table = random_cache(
            seed,
            self.kv_lens,
            heads=self.heads,
            page_size=self.page_size,
            pages_per_row=self.pages_per_row,
            num_pages=None,
            dtype=dtype,
        )
        shape = (self.packed_tokens, self.heads.num_heads, self.heads.head_dim)
        q = jnp.asarray(random_normal(seed + 1, shape), dtype)
        q_starts = jnp.asarray([0, *itertools.accumulate(self.q_lens)], jnp.int32)
        return q, kv_pages, page_table, q_starts, jnp.asarray(self.kv_lens, jnp.int32)


ARG_SPECS = (
    ArgSpec(name="qwen2.5-0.5b-8x1024", heads=QWEN_0_5B, q_lens=(1024,) * 8, pages_per_row=64),
    ArgSpec(name="qwen2.5-0.5b-1x1024", heads=QWEN_0_5B, q_lens=(1024,), pages_per_row=64),
    ArgSpec(name="qwen2.5-0.5b-1x32", heads=QWEN_0_5B, q_lens=(32,), pages_per_row=64),
    ArgSpec(
        name="qwen2.5-0.5b-ragged",
        heads=QWEN_0_5B,
        q_lens=random_lens(14, 100, 1024),
        num_tokens=8192,
        pages_per_row=128,
    ),
    ArgSpec(
        name="qwen2.5-0.5b-chunk-of-16k",
        heads=QWEN_0_5B,
        q_lens=(2048,),
        cached_lens=(14_336,),
        pages_per_row=1024,
    ),
    ArgSpec(name="qwen2.5-7b-4x1024", heads=QWEN_7B, q_lens=(1024,) * 4, pages_per_row=64),
    ArgSpec(
        name="qwen2.5-1.5b-ragged",
        heads=QWEN_1_5B,
        q_lens=(100, 0, 1, 411),
        cached_lens=(0, 0, 700, 33),
        num_tokens=1024,
        pages_per_row=64,
    ),
    ArgSpec(
        name="qwen2.5-32b-ragged",
        heads=QWEN_32B,
        q_lens=(333, 100, 2, 77),
        cached_lens=(0, 128, 500, 1),
        num_tokens=512,
        pages_per_row=64,
    ),
    ArgSpec(
        name="demo-ragged",
        heads=DEMO,
        q_lens=(20, 0, 7, 1),
        cached_lens=(0, 5, 3, 40),
        num_tokens=32,
        pages_per_row=4,
    ),
    ArgSpec(
        name="grouped-odd",
        heads=QWEN_0_5B,
        q_lens=(1, 37, 0, 5),
        cached_lens=(0, 11, 0, 60),
        num_tokens=45,
        pages_per_row=5,
    ),
    ArgSpec(
        name="only-padding",
        heads=DEMO,
        q_lens=(0, 0),
        num_tokens=16,
        pages_per_row=2,
    ),
    ArgSpec(
        name="more-rows-than-tokens",
        heads=DEMO,
        q_lens=(1, 0, 1, 0, 0, 1, 0, 0),
        cached_lens=(16, 0, 15, 0, 0, 0, 0, 0),
        num_tokens=4,
        pages_per_row=2,
    ),
    ArgSpec(
        name="multi-head-odd",
        heads=MULTI_HEAD,
        q_lens=(50, 3),
        cached_lens=(17, 0),
        num_tokens=64,
        pages_per_row=5,
    ),
    ArgSpec(
        name="multi-query",
        heads=MULTI_QUERY,
        q_lens=(30, 19),
        cached_lens=(0, 65),
        pages_per_row=6,
    ),
    ArgSpec(
        name="small-heads",
        heads=SMALL,
        q_lens=(9, 14),
        cached_lens=(8, 0),
        num_tokens=24,
        pages_per_row=3,
        page_size=8,
    ),
    ArgSpec(
        name="gemma2-2b",
        heads=GEMMA_2_2B,
        q_lens=(40, 20),
        cached_lens=(0, 33),
        num_tokens=64,
        pages_per_row=4,
    ),
)
