"""Ragged prefill attention as a Pallas Triton kernel: causal flash attention over paged keys.

One program attends one (query block, kv head). The query heads that share the kv head are packed
into the rows of the matrix products: row `i` is token `i // group`, head `i % group`, so no rows
are lost to a group that is not a power of two. Tiles of keys that every query sees need no mask;
the few at the diagonal follow in a second loop.

Source: Dao, FlashAttention-2, arXiv:2307.08691; Kwon et al., PagedAttention, arXiv:2309.06180.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.ragged_prefill_attention.blocks import query_blocks
from pallas_kernels.triton_math import check_head_dim, dot, exp2_scaled

_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters of the prefill kernel.

    Attributes:
      block_rows: Packed query rows (token, head) of a program; a power of two, at least 16.
      block_kv: Tokens gathered per tile; a power of two, at least 16.
      num_warps: Warps per program.
      num_stages: Depth of the software pipeline; one tile fewer is in flight.
    """

    block_rows: int = 128
    block_kv: int = 64
    num_warps: int = 4
    num_stages: int = 3


def default_config(q: jax.Array, num_kv_heads: int) -> TuningConfig:
    """Chooses tile parameters for a shape and dtype."""
    num_tokens, num_heads, head_dim = q.shape
    group = num_heads // num_kv_heads
    rows = 32 if q.dtype == jnp.float32 else 128 if num_tokens * group >= 1024 else 64
    rows = max(rows, pl.next_power_of_2(group))
    if q.dtype == jnp.float32:  # no tensor cores: small tiles, or the registers do not hold them
        block_kv, num_warps = (16, 8) if head_dim > 64 else (32, 4)
        return TuningConfig(block_rows=rows, block_kv=block_kv, num_warps=num_warps, num_stages=2)
    return TuningConfig(
        block_rows=rows,
        block_kv=32 if head_dim > 128 else 64,
        num_warps=8 if head_dim > 64 and rows > 64 else 4,
    )


def _prefill_kernel(
    q_ref,  # [T, N, H]
    kv_ref,  # [num_pages * 2 * K * page_size, H]
    page_table_ref,  # [R, P]
    row_ref,  # [num_blocks], and so are begin, end, kv_end
    begin_ref,
    end_ref,
    kv_end_ref,
    out_ref,  # [T, N, H]
    *,
    group: int,
    num_kv_heads: int,
    page_size: int,
    scale: float,
    config: TuningConfig,
    interpret: bool,
):
    # The longest blocks, late in their rows, start first.
    block = row_ref.shape[0] - 1 - pl.program_id(1)
    kv_head = pl.program_id(0)
    row, begin, end = row_ref[block], begin_ref[block], end_ref[block]
    kv_end = kv_end_ref[block]
    block_rows, block_kv = config.block_rows, config.block_kv
    head_dim = q_ref.shape[-1]
    exp2 = functools.partial(exp2_scaled, scale=scale * _LOG2_E, interpret=interpret)

    packed = jnp.arange(block_rows)
    token = begin + jax.lax.div(packed, group)
    live = (packed < block_rows // group * group) & (token < end)
    q_position = kv_end - end + token
    head = kv_head * group + jax.lax.rem(packed, group)
    dims = jnp.arange(head_dim)[None, :]
    q_index = (token[:, None], head[:, None], dims)
    q = pltriton.load(q_ref.at[q_index], mask=live[:, None], other=0.0)

    def load_pages(tile):
        position = tile * block_kv + jnp.arange(block_kv)
        page = jax.lax.div(position, page_size)
        return pltriton.load(page_table_ref.at[row, page], mask=position < kv_end, other=0)

    def attend_tile(masked, tile, carry):
        pad = 0.0 if masked else None
        page, row_max, row_sum, acc = carry
        next_page = load_pages(tile + 1)
        position = tile * block_kv + jnp.arange(block_kv)
        key_row = (page * (2 * num_kv_heads) + kv_head) * page_size
        key_row += jax.lax.rem(position, page_size)
        value_row = key_row + num_kv_heads * page_size
        in_row = (position < kv_end)[:, None] if masked else None
        k = pltriton.load(kv_ref.at[key_row[:, None], dims], mask=in_row, other=pad)
        scores = dot(q, k.T)
        if masked:
            visible = (position[None, :] <= q_position[:, None]) & (position < kv_end)[None, :]
            scores = jnp.where(visible, scores, -jnp.inf)
        new_max = jnp.maximum(row_max, scores.max(axis=1))
        shift = new_max * (scale * _LOG2_E)
        weights = exp2(scores, shift[:, None])
        rescale = exp2(row_max, shift)
        v = pltriton.load(kv_ref.at[value_row[:, None], dims], mask=in_row, other=pad)
        acc = acc * rescale[:, None] + dot(weights.astype(v.dtype), v)
        return next_page, new_max, row_sum * rescale + weights.sum(axis=1), acc

    num_tiles = pl.cdiv(kv_end, block_kv)
    num_full = jnp.maximum(kv_end - end + begin + 1, 0) // block_kv
    carry = (
        load_pages(0),
        jnp.full(block_rows, -jnp.inf, jnp.float32),
        jnp.zeros(block_rows, jnp.float32),
        jnp.zeros((block_rows, head_dim), jnp.float32),
    )
    carry = jax.lax.fori_loop(0, num_full, functools.partial(attend_tile, False), carry)
    carry = jax.lax.fori_loop(num_full, num_tiles, functools.partial(attend_tile, True), carry)
    _, _, row_sum, acc = carry
    out = acc / jnp.where(row_sum > 0, row_sum, 1.0)[:, None]
    pltriton.store(out_ref.at[q_index], out.astype(out_ref.dtype), mask=live[:, None])


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def ragged_prefill_attention(
    q: Float[Array, "T N H"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "R P"],
    q_starts: Int[Array, " R+1"],
    kv_lens: Int[Array, " R"],
    *,
    scale: float,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> Float[Array, "T N H"]:
    """Attends packed ragged queries to their rows' pages; see `api.ragged_prefill_attention`.

    Args:
      config: Tile parameters; None takes `default_config`.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_pages, _, num_kv_heads, page_size, _ = kv_pages.shape
    group = num_heads // num_kv_heads
    check_head_dim(head_dim)
    config = config or default_config(q, num_kv_heads)
    blocks = query_blocks(q_starts, kv_lens, num_tokens, config.block_rows // group)
    kernel = functools.partial(
        _prefill_kernel,
        group=group,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        scale=scale,
        config=config,
        interpret=interpret,
    )
    # The lengths are not known here; take it that a query sees half of what a row can hold.
    kv_tokens = min(page_table.shape[1], num_pages) * page_size // 2
    return pl.pallas_call(
        kernel,
        grid=(num_kv_heads, blocks.row.shape[0]),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * num_heads * head_dim * num_tokens * kv_tokens,
            transcendentals=num_heads * num_tokens * kv_tokens,
            bytes_accessed=2 * q.size * q.dtype.itemsize,
        ),
        interpret=interpret,
        name="ragged_prefill_attention",
    )(q, kv_pages.reshape(-1, head_dim), page_table, *blocks)
