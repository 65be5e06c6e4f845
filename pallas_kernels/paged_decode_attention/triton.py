"""Paged decode attention as a Pallas Triton kernel: flash-decoding for one query token a row.

One program attends one (row, kv head, split): the group of query heads that share the kv head is
packed into the rows of one small matrix product, and the program walks its part of the row's
tokens, tile by tile, with an online softmax. With more than one split, a second small kernel
combines the float32 partials. No work depends on how wide the page table is.

Source: Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention, arXiv:2309.06180.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.triton_math import MIN_DOT_ROWS, check_head_dim, dot, exp2_scaled

_LOG2_E = math.log2(math.e)
_MAX_SPLITS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters of the decode kernel.

    Attributes:
      block_kv: Tokens gathered per tile; a power of two, at least 16.
      num_splits: Programs along one row's length; a power of two. None chooses by shape.
      min_split_tiles: Tiles that a split takes before the next split of the row gets any.
      target_programs: With `num_splits=None`, programs to aim at over the whole grid.
      whole_from: Rows times kv heads from which rows are not split at all: on an H200 256 rows of
        1,024 tokens (14 / 2 heads of 64) take 37.7 us whole and 47.5 us in two splits.
      num_warps: Warps per program.
      num_stages: Depth of the software pipeline; one tile fewer is in flight.
    """

    block_kv: int = 64
    num_splits: int | None = None
    min_split_tiles: int = 2
    target_programs: int = 1056
    whole_from: int = 512
    num_warps: int = 4
    num_stages: int = 3


def default_config(q: jax.Array) -> TuningConfig:
    """Chooses tile parameters for a shape and dtype."""
    head_dim = q.shape[-1]
    if q.dtype == jnp.float32:
        return TuningConfig(block_kv=32, num_warps=4 if head_dim <= 128 else 8, num_stages=2)
    return TuningConfig(block_kv=min(max(4096 // head_dim, 16), 128))


def choose_num_splits(config: TuningConfig, batch: int, num_kv_heads: int, max_tokens: int) -> int:
    """Returns the power of two that fills the GPU at a small batch and is 1 at a large one."""
    if config.num_splits is not None:
        return config.num_splits
    if batch * num_kv_heads >= config.whole_from:
        return 1
    useful = -(-max_tokens // (config.block_kv * config.min_split_tiles))
    wanted = min(config.target_programs // (batch * num_kv_heads), useful, _MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def _decode_kernel(
    q_ref,  # [B, N, H]
    kv_ref,  # [num_pages * 2 * K * page_size, H]
    page_table_ref,  # [B, P]
    kv_lens_ref,  # [B]
    out_ref,  # [B, N, H], or partial outputs [B, num_splits, N, H] float32
    *lse_ref,  # [B, num_splits, N] float32, only with several splits
    group: int,
    num_kv_heads: int,
    page_size: int,
    num_splits: int,
    scale: float,
    config: TuningConfig,
    interpret: bool,
):
    kv_head, row, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    block_kv = config.block_kv
    exp2 = functools.partial(exp2_scaled, scale=scale * _LOG2_E, interpret=interpret)
    head_dim = q_ref.shape[-1]
    kv_len = kv_lens_ref[row]
    first, last = _split_range(kv_len, split, num_splits, config)

    packed = max(MIN_DOT_ROWS, pl.next_power_of_2(group))
    in_group = jnp.arange(packed) < group
    heads = kv_head * group + jnp.arange(packed)
    dims = jnp.arange(head_dim)[None, :]
    q = pltriton.load(q_ref.at[row, heads[:, None], dims], mask=in_group[:, None], other=0.0)

    def load_pages(tile):
        position = tile * block_kv + jnp.arange(block_kv)
        page = jax.lax.div(position, page_size)
        return pltriton.load(page_table_ref.at[row, page], mask=position < kv_len, other=0)

    def attend_tile(tile, carry):
        # The ids of the next tile's pages are fetched one tile ahead: then the address of a key
        # is known when its tile begins, and the compiler can keep several tiles in flight.
        page, row_max, row_sum, acc = carry
        next_page = load_pages(tile + 1)
        position = tile * block_kv + jnp.arange(block_kv)
        valid = position < kv_len
        key_row = (page * (2 * num_kv_heads) + kv_head) * page_size
        key_row += jax.lax.rem(position, page_size)
        key_row = key_row[:, None]
        k = pltriton.load(kv_ref.at[key_row, dims], mask=valid[:, None], other=0.0)
        scores = jnp.where(valid[None, :], dot(q, k.T), -jnp.inf)
        new_max = jnp.maximum(row_max, scores.max(axis=1))
        shift = new_max * (scale * _LOG2_E)
        weights = exp2(scores, shift[:, None])
        rescale = exp2(row_max, shift)
        value_row = key_row + num_kv_heads * page_size
        v = pltriton.load(kv_ref.at[value_row, dims], mask=valid[:, None], other=0.0)
        acc = acc * rescale[:, None] + dot(weights.astype(v.dtype), v)
        return next_page, new_max, row_sum * rescale + weights.sum(axis=1), acc

    _, row_max, row_sum, acc = jax.lax.fori_loop(
        first,
        last,
        attend_tile,
        (
            load_pages(first),
            jnp.full(packed, -jnp.inf, jnp.float32),
            jnp.zeros(packed, jnp.float32),
            jnp.zeros((packed, head_dim), jnp.float32),
        ),
    )
    out = acc / jnp.where(row_sum > 0, row_sum, 1.0)[:, None]

    if num_splits == 1:
        out = out.astype(out_ref.dtype)
        pltriton.store(out_ref.at[row, heads[:, None], dims], out, mask=in_group[:, None])
        return

    @pl.when(first < last)
    def _store_partial():
        pltriton.store(out_ref.at[row, split, heads[:, None], dims], out, mask=in_group[:, None])
        lse = row_max * (scale * _LOG2_E) + jnp.log2(row_sum)
        pltriton.store(lse_ref[0].at[row, split, heads], lse, mask=in_group)


def _split_range(
    kv_len: jax.Array, split: jax.Array, num_splits: int, config: TuningConfig
) -> tuple[jax.Array, jax.Array]:
    """Tiles [first, last) of a split; empty when the row needs fewer splits."""
    num_tiles = pl.cdiv(kv_len, config.block_kv)
    split_tiles = jnp.maximum(pl.cdiv(num_tiles, num_splits), config.min_split_tiles)
    first = split * split_tiles
    return first, jnp.minimum(first + split_tiles, num_tiles)


def _combine_kernel(
    partial_ref,  # [B, num_splits, N, H] float32
    lse_ref,  # [B, num_splits, N] float32
    kv_lens_ref,  # [B]
    out_ref,  # [B, N, H]
    *,
    num_splits: int,
    config: TuningConfig,
):
    head, row = pl.program_id(0), pl.program_id(1)
    splits = jnp.arange(num_splits)
    first, last = _split_range(kv_lens_ref[row], splits, num_splits, config)
    live = first < last  # the rest was never written
    lse = pltriton.load(lse_ref.at[row, splits, head], mask=live, other=-jnp.inf)
    top = jnp.where(kv_lens_ref[row] > 0, lse.max(axis=0), 0.0)
    weights = jnp.exp2(lse - top)
    partial = pltriton.load(
        partial_ref.at[row, splits[:, None], head, jnp.arange(partial_ref.shape[-1])[None, :]],
        mask=live[:, None],
        other=0.0,
    )
    total = weights.sum(axis=0)
    out = (weights[:, None] * partial).sum(axis=0) / jnp.where(total > 0, total, 1.0)
    out_ref[row, head, :] = out.astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def paged_decode_attention(
    q: Float[Array, "B N H"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "B P"],
    kv_lens: Int[Array, " B"],
    *,
    scale: float,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "B N H"]:
    """Attends one query token per row to its pages; see `api.paged_decode_attention`.

    Args:
      config: Tile parameters; None takes `default_config`.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    batch, num_heads, head_dim = q.shape
    num_pages, _, num_kv_heads, page_size, _ = kv_pages.shape
    check_head_dim(head_dim)
    config = config or default_config(q)
    max_tokens = page_table.shape[1] * page_size
    num_splits = choose_num_splits(config, batch, num_kv_heads, max_tokens)

    out_shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    partial_shape = (batch, num_splits, num_heads, head_dim)
    partials = (
        jax.ShapeDtypeStruct(partial_shape, jnp.float32),
        jax.ShapeDtypeStruct(partial_shape[:-1], jnp.float32),
    )
    kernel = functools.partial(
        _decode_kernel,
        group=num_heads // num_kv_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        num_splits=num_splits,
        scale=scale,
        config=config,
        interpret=interpret,
    )
    # The lengths are not known here; the pool bounds what all rows together can hold.
    kv_tokens = min(batch * page_table.shape[1], num_pages) * page_size
    out = pl.pallas_call(
        kernel,
        grid=(num_kv_heads, batch, num_splits),
        out_shape=out_shape if num_splits == 1 else partials,
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * num_heads * head_dim * kv_tokens,
            transcendentals=num_heads * kv_tokens,
            bytes_accessed=2 * num_kv_heads * head_dim * kv_tokens * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="paged_decode_attention",
    )(q, kv_pages.reshape(-1, head_dim), page_table, kv_lens)
    if num_splits == 1:
        return out
    return pl.pallas_call(
        functools.partial(_combine_kernel, num_splits=num_splits, config=config),
        grid=(num_heads, batch),
        out_shape=out_shape,
        compiler_params=pltriton.CompilerParams(
            num_warps=1 if num_splits * head_dim <= 1024 else 4, num_stages=1
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(partial_shape),
            transcendentals=math.prod(partial_shape[:-1]),
            bytes_accessed=4 * math.prod(partial_shape),
        ),
        interpret=interpret,
        name="paged_decode_attention_combine",
    )(*out, kv_lens)
