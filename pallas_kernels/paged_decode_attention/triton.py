"""Paged decode attention as a Pallas Triton kernel: flash-decoding for one query token a row.

One program attends one (row, kv head, split): the group of query heads that share the kv head is
packed into the rows of one small matrix product, and the program walks its part of the row's
tokens, tile by tile, with an online softmax. The new token is rotated here, written to its page,
and is where the softmax of the first split begins. With more than one split, the program that
comes last combines the float32 partials. No work depends on how wide the page table is.

Source: Dao et al., Flash-Decoding (2023); Kwon et al., PagedAttention, arXiv:2309.06180.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_decode_attention.tuning import (
    TuningConfig,
    choose_num_splits,
    default_config,
)
from pallas_kernels.triton_math import MIN_DOT_ROWS, check_head_dim, dot, exp2_scaled

_LOG2_E = math.log2(math.e)
_COMBINED_AT_ONCE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """What is static of a call."""

    group: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_splits: int
    scale: float
    config: TuningConfig
    interpret: bool

    @property
    def packed(self) -> int:
        """Rows of the matrix products: the query heads of a group and some that are not there."""
        return max(MIN_DOT_ROWS, pl.next_power_of_2(self.group))

    @property
    def in_group(self) -> jax.Array:
        return jnp.arange(self.packed) < self.group

    @property
    def dims(self) -> jax.Array:
        return jnp.arange(self.head_dim)[None, :]

    def exp2(self, x: jax.Array, shift: jax.Array) -> jax.Array:
        """2 ** (x - shift) of scores that are not scaled yet and a shift that is."""
        return exp2_scaled(x, shift, scale=self.log2_scale, interpret=self.interpret)

    @property
    def log2_scale(self) -> float:
        return self.scale * _LOG2_E

    def key_rows(self, page: jax.Array, kv_head: jax.Array, position: jax.Array) -> jax.Array:
        """Row of the flat cache that holds a key; its value is `to_value` rows further."""
        first = (page * (2 * self.num_kv_heads) + kv_head) * self.page_size
        return first + jax.lax.rem(position, self.page_size)

    @property
    def to_value(self) -> int:
        return self.num_kv_heads * self.page_size


class _Softmax(NamedTuple):
    """An online softmax over keys: the weighted values are `acc / total`."""

    top: jax.Array  # [packed], the largest score
    total: jax.Array  # [packed]
    acc: jax.Array  # [packed, H]


def _decode_kernel(
    qkv_ref,  # [B, N + 2 K, H], not rotated
    cos_ref,  # [B, H / 2]
    sin_ref,  # [B, H / 2]
    kv_ref,  # [num_pages * 2 * K * page_size, H]
    page_table_ref,  # [B, P]
    kv_lens_ref,  # [B]
    *refs,  # out [B, N, H], the cache again; with splits before them arrivals [B, K], and after
    # them float32 partials [B, num_splits, N, H] and their log-sum-exp [B, num_splits, N]
    call: _Call,
):
    kv_head, row, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    out_ref, new_kv_ref = refs[:2] if call.num_splits == 1 else refs[1:3]
    heads = kv_head * call.group + jnp.arange(call.packed)
    # A program takes about as long as the loads that wait for one another, so what it begins with
    # is asked for before anything is computed, and the new token is written last.
    kv_len = kv_lens_ref[row]
    pages = _load_pages(page_table_ref, row, split, call)
    token = _load_new_token(qkv_ref, cos_ref, sin_ref, row, kv_head, heads, call)
    num_cached = jnp.maximum(kv_len - 1, 0)

    def attend() -> _Softmax:
        new_page = page_table_ref[row, jax.lax.div(num_cached, call.page_size)]
        q, k, v = _rotate_new_token(token, call)
        is_first = (split == 0) & (kv_len > 0)

        # The new token is not read back from its page: the softmax of the first split begins
        # with it.
        score = (q.astype(jnp.float32) * k.astype(jnp.float32)).sum(axis=1)
        value = jnp.broadcast_to(v.astype(jnp.float32), (call.packed, call.head_dim))
        begin = _Softmax(
            top=jnp.where(is_first, score, -jnp.inf),
            total=jnp.where(is_first, jnp.ones_like(score), 0.0),
            acc=jnp.where(is_first, value, 0.0),
        )
        softmax = _attend_cached(
            q, begin, kv_ref, page_table_ref, row, kv_head, split, pages, num_cached, call
        )

        @pl.when(is_first)
        def _write_new_token():
            where = (call.key_rows(new_page, kv_head, num_cached) + jnp.arange(1))[:, None]
            pltriton.store(new_kv_ref.at[where, call.dims], k)
            pltriton.store(new_kv_ref.at[where + call.to_value, call.dims], v)

        return softmax

    def store_out(out):
        where = out_ref.at[row, heads[:, None], call.dims]
        pltriton.store(where, out.astype(out_ref.dtype), mask=call.in_group[:, None])

    def average(softmax: _Softmax) -> jax.Array:
        return softmax.acc / jnp.where(softmax.total > 0, softmax.total, 1.0)[:, None]

    if call.num_splits == 1:
        store_out(average(attend()))
        return
    arrivals_ref, _, _, partial_ref, lse_ref = refs
    num_live = _num_live_splits(num_cached, call)

    @pl.when(split < num_live)
    def _live():
        softmax = attend()
        out = average(softmax)
        pl.when(num_live == 1)(lambda: store_out(out))

        @pl.when(num_live > 1)
        def _store_partial():
            where = partial_ref.at[row, split, heads[:, None], call.dims]
            pltriton.store(where, out, mask=call.in_group[:, None])
            lse = softmax.top * call.log2_scale + jnp.log2(softmax.total)
            pltriton.store(lse_ref.at[row, split, heads], lse, mask=call.in_group)
            if not call.interpret:
                pltriton.debug_barrier()  # the whole program has stored before it says so
            one = jnp.ones((), jnp.int32)
            num_arrived = pltriton.atomic_add(arrivals_ref, (row, kv_head), one)

            @pl.when(num_arrived == num_live - 1)
            def _combine():
                arrivals_ref[row, kv_head] = 0
                store_out(
                    average(_combine_splits(partial_ref, lse_ref, row, heads, num_live, call))
                )


class _NewToken(NamedTuple):
    """What a program reads of the new token, not rotated: each with the other half of its pairs."""

    q: tuple[jax.Array, jax.Array]  # [packed, H]
    k: tuple[jax.Array, jax.Array]  # [1, H]
    v: jax.Array  # [1, H]
    cos: jax.Array  # [1, H]
    sin: jax.Array  # [1, H]


def _load_new_token(
    qkv_ref, cos_ref, sin_ref, row: jax.Array, kv_head: jax.Array, heads: jax.Array, call: _Call
) -> _NewToken:
    half = call.head_dim // 2
    partner = (call.dims + half) % call.head_dim
    key_head = call.group * call.num_kv_heads + kv_head + jnp.arange(1)

    def load(heads, dims, mask=None):
        other = None if mask is None else 0.0
        return pltriton.load(qkv_ref.at[row, heads[:, None], dims], mask=mask, other=other)

    def load_pairs(heads, mask=None):
        return load(heads, call.dims, mask), load(heads, partner, mask)

    return _NewToken(
        q=load_pairs(heads, call.in_group[:, None]),
        k=load_pairs(key_head),
        v=load(key_head + call.num_kv_heads, call.dims),
        cos=pltriton.load(cos_ref.at[row, call.dims % half]),
        sin=pltriton.load(sin_ref.at[row, call.dims % half]),
    )


def _rotate_new_token(token: _NewToken, call: _Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries of a group [packed, H], rotated key and value [1, H]."""
    sin = jnp.where(call.dims < call.head_dim // 2, -token.sin, token.sin)

    def rotate(own, other):
        rotated = own.astype(jnp.float32) * token.cos + other.astype(jnp.float32) * sin
        return rotated.astype(own.dtype)

    return rotate(*token.q), rotate(*token.k), token.v


def _load_pages(page_table_ref, row: jax.Array, tile: jax.Array, call: _Call) -> jax.Array:
    """Pages of a tile's tokens, whichever of them there are: the length need not be known yet."""
    page = jax.lax.div(
        tile * call.config.block_kv + jnp.arange(call.config.block_kv), call.page_size
    )
    return pltriton.load(page_table_ref.at[row, page], mask=page < page_table_ref.shape[1], other=0)


def _attend_cached(
    q: jax.Array,
    begin: _Softmax,
    kv_ref,
    page_table_ref,
    row: jax.Array,
    kv_head: jax.Array,
    split: jax.Array,
    pages: jax.Array,
    num_cached: jax.Array,
    call: _Call,
) -> _Softmax:
    """Goes on with a softmax over the tiles of a split, the first of which lies in `pages`.

    The splits of a row take its tiles in turn: where a split begins does not hang on the length.
    """
    block_kv = call.config.block_kv
    stride = _num_live_splits(num_cached, call)

    def attend_tile(i, carry):
        # The ids of the next tile's pages are fetched one tile ahead: then the address of a key
        # is known when its tile begins, and the compiler can keep several tiles in flight.
        page, (top, total, acc) = carry
        tile = split + i * stride
        next_page = _load_pages(page_table_ref, row, tile + stride, call)
        position = tile * block_kv + jnp.arange(block_kv)
        valid = position < num_cached
        key_row = call.key_rows(page, kv_head, position)[:, None]
        k = pltriton.load(kv_ref.at[key_row, call.dims], mask=valid[:, None], other=0.0)
        scores = jnp.where(valid[None, :], dot(q, k.T), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1))
        shift = new_top * call.log2_scale
        weights = call.exp2(scores, shift[:, None])
        rescale = call.exp2(top, shift)
        value_row = key_row + call.to_value
        v = pltriton.load(kv_ref.at[value_row, call.dims], mask=valid[:, None], other=0.0)
        acc = acc * rescale[:, None] + dot(weights.astype(v.dtype), v)
        return next_page, _Softmax(new_top, total * rescale + weights.sum(axis=1), acc)

    num_own = pl.cdiv(pl.cdiv(num_cached, block_kv) - split, stride)
    _, softmax = jax.lax.fori_loop(0, num_own, attend_tile, (pages, begin))
    return softmax


def _combine_splits(
    partial_ref, lse_ref, row: jax.Array, heads: jax.Array, num_live: jax.Array | int, call: _Call
) -> _Softmax:
    """One softmax out of all live splits', in the order of the splits, whoever came last."""

    def merge(i, softmax):
        splits = i * _COMBINED_AT_ONCE + jnp.arange(_COMBINED_AT_ONCE)
        mask = (splits < num_live)[:, None] & call.in_group[None, :]
        # Volatile: they were written by other programs, so not from this one's cache.
        lse = pltriton.load(
            lse_ref.at[row, splits[:, None], heads[None, :]],
            mask=mask,
            other=jnp.finfo(jnp.float32).min,
            volatile=True,
        )
        partial = pltriton.load(
            partial_ref.at[row, splits[:, None, None], heads[None, :, None], call.dims[None]],
            mask=mask[:, :, None],
            other=0.0,
            volatile=True,
        )
        top = jnp.maximum(softmax.top, lse.max(axis=0))
        weights, rescale = jnp.exp2(lse - top[None, :]), jnp.exp2(softmax.top - top)
        return _Softmax(
            top=top,
            total=softmax.total * rescale + weights.sum(axis=0),
            acc=softmax.acc * rescale[:, None] + (weights[:, :, None] * partial).sum(axis=0),
        )

    begin = _Softmax(
        top=jnp.full(call.packed, jnp.finfo(jnp.float32).min),
        total=jnp.zeros(call.packed, jnp.float32),
        acc=jnp.zeros((call.packed, call.head_dim), jnp.float32),
    )
    return jax.lax.fori_loop(0, pl.cdiv(num_live, _COMBINED_AT_ONCE), merge, begin)


def _num_live_splits(num_cached: jax.Array, call: _Call) -> jax.Array | int:
    """Splits that have something to read; the first is always live."""
    if call.num_splits == 1:
        return 1
    num_tiles = pl.cdiv(num_cached, call.config.block_kv)
    useful = pl.cdiv(num_tiles, call.config.min_split_tiles)
    return jnp.clip(useful, 1, call.num_splits)


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def paged_decode_attention(
    q: Float[Array, "B N H"],
    k: Float[Array, "B K H"],
    v: Float[Array, "B K H"],
    cos: Float[Array, "B half"],
    sin: Float[Array, "B half"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    page_table: Int[Array, "B P"],
    kv_lens: Int[Array, " B"],
    *,
    scale: float,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B N H"], Float[Array, "pages 2 K page_size H"]]:
    """Appends one token per row and attends to its pages; see `api.paged_decode_attention`.

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
    # Parts of one projection are one array again: XLA drops the cut and the glue.
    qkv = jnp.concatenate([q, k, v], axis=1)
    flat = kv_pages.reshape(-1, head_dim)
    inputs = [qkv, cos, sin, flat, page_table, kv_lens]
    outputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, flat)]
    if num_splits > 1:
        # NOTE: the kernel counts in this input, and leaves it as it was, all zero: XLA may give
        # the same zeros to every call, which run one after another.
        inputs.append(jnp.zeros((batch, num_kv_heads), jnp.int32))
        partial_shape = (batch, num_splits, num_heads, head_dim)
        outputs.append(jax.ShapeDtypeStruct(partial_shape, jnp.float32))
        outputs.append(jax.ShapeDtypeStruct(partial_shape[:-1], jnp.float32))
    call = _Call(
        group=num_heads // num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_splits=num_splits,
        scale=scale,
        config=config,
        interpret=interpret,
    )
    # The lengths are not known here; the pool bounds what all rows together can hold.
    kv_tokens = min(batch * page_table.shape[1], num_pages) * page_size
    out, flat, *_ = pl.pallas_call(
        functools.partial(_decode_kernel, call=call),
        grid=(num_kv_heads, batch, num_splits),
        out_shape=outputs,
        input_output_aliases={3: 1},
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
    )(*inputs)
    return out, flat.reshape(kv_pages.shape)
