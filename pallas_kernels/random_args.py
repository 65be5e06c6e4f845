"""What the arguments of the attention ops are made of, in tests and benchmarks.

The head counts of models, row lengths, and random caches in which everything that must not be
read is NaN.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Heads:
    """The head counts of a model.

    Attributes:
      num_heads: Query heads.
      num_kv_heads: Heads of keys and values.
      head_dim: Size of a head.
      source: Where they come from.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    source: str

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


QWEN_0_5B = Heads(14, 2, 64, "config.json of Qwen2.5-0.5B")
QWEN_1_5B = Heads(12, 2, 128, "config.json of Qwen2.5-1.5B")
QWEN_7B = Heads(28, 4, 128, "config.json of Qwen2.5-7B")
QWEN_32B = Heads(40, 8, 128, "config.json of Qwen2.5-32B")
GEMMA_2_2B = Heads(8, 4, 256, "config.json of gemma-2-2b")
DEMO = Heads(4, 2, 64, "the demo model of jaxengine")
MULTI_HEAD = Heads(6, 6, 64, "heads that share nothing, as in GPT-2")
MULTI_QUERY = Heads(20, 1, 64, "one kv head for all, as in Falcon-7B; a group above 16")
SMALL = Heads(4, 2, 32, "test models")


def random_lens(count: int, low: int, high: int) -> tuple[int, ...]:
    """Returns `count` lengths from `low` to `high`, always the same."""
    return tuple(int(n) for n in np.random.default_rng(0).integers(low, high + 1, count))


def random_normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Returns standard normal float32; on the host, where nothing has to be compiled for it."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_cache(
    seed: int,
    kv_lens: Sequence[int],
    *,
    heads: Heads,
    page_size: int,
    pages_per_row: int,
    num_pages: int | None,
    dtype: jax.typing.DTypeLike,
) -> tuple[Float[Array, "pages 2 K page_size H"], Int[Array, "B P"]]:
    """Returns a KV cache and a page table that hold rows of the given lengths.

    Pages are handed out in a random order. The null page, pages of nobody and places past a
    row's length are NaN.

    Args:
      num_pages: Pages of the pool; None takes a few more than the rows need.
    """
    rng = np.random.default_rng(seed)
    row_pages = [-(-kv_len // page_size) for kv_len in kv_lens]
    num_used = sum(row_pages)
    num_pages = num_pages or num_used + 3
    used = rng.permutation(num_pages - 1)[:num_used] + 1
    page_table = np.zeros((len(kv_lens), pages_per_row), np.int32)
    filled = np.full(num_used, page_size)
    first = 0
    for row, (kv_len, num_row_pages) in enumerate(zip(kv_lens, row_pages, strict=True)):
        page_table[row, :num_row_pages] = used[first : first + num_row_pages]
        first += num_row_pages
        if num_row_pages:
            filled[first - 1] = kv_len - (num_row_pages - 1) * page_size
    is_token = np.arange(page_size) < filled[:, None]
    shape = (2, heads.num_kv_heads, page_size, heads.head_dim)
    content = random_normal(seed, (num_used, *shape))
    content = np.where(is_token[:, None, None, :, None], content, np.nan)
    if num_pages == num_used + 3:
        kv_pages = np.full((num_pages, *shape), np.nan, np.float32)
        kv_pages[used] = content
        return jnp.asarray(kv_pages, dtype), jnp.asarray(page_table)
    # A pool far larger than its rows is better filled on the device.
    kv_pages = jnp.full((num_pages, *shape), jnp.nan, dtype)
    kv_pages = kv_pages.at[used].set(jnp.asarray(content, dtype))
    return kv_pages, jnp.asarray(page_table)
