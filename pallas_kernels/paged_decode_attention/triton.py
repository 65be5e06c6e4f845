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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.triton_math import MIN_DOT_ROWS, check_head_dim, dot, exp2_scaled, trigger

_LOG2_E = math.log2(math.e)
_MAX_SPLITS = 64
_COMBINED_AT_ONCE = 4


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
    triggers: bool = False


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
    qkv_ref,  # [B, N + 2 K, H], not rotated
    cos_ref,  # [B, H / 2]
    sin_ref,  # [B, H / 2]
    kv_ref,  # [num_pages * 2 * K * page_size, H]
    page_table_ref,  # [B, P]
    kv_lens_ref,  # [B]
    *refs,  # see `_name_refs`
    group: int,
    num_kv_heads: int,
    page_size: int,
    num_splits: int,
    scale: float,
    config: TuningConfig,
    interpret: bool,
    prefetch: int,
):
    kv_head, row, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    prefetch_ref = None
    if prefetch:
        prefetch_ref, *refs, dummy_ref = refs
    arrivals_ref, out_ref, new_kv_ref, partial_ref, lse_ref = _name_refs(refs, num_splits)
    if prefetch:

        @pl.when(split >= num_splits)
        def _pull():
            chunk = ((split - num_splits) * pl.num_programs(1) + row) * num_kv_heads + kv_head
            at = chunk * prefetch + jnp.arange(prefetch)
            x = pltriton.load(prefetch_ref.at[at], mask=at < prefetch_ref.shape[0], other=0.0)
            top = x.astype(jnp.float32).max()

            @pl.when(top > 3e38)
            def _never():
                dummy_ref[0] = top

    block_kv = config.block_kv
    exp2 = functools.partial(exp2_scaled, scale=scale * _LOG2_E, interpret=interpret)
    head_dim = qkv_ref.shape[-1]
    kv_len = kv_lens_ref[row]
    num_cached = jnp.maximum(kv_len - 1, 0)
    first, last = _split_range(num_cached, split, num_splits, config)

    packed = max(MIN_DOT_ROWS, pl.next_power_of_2(group))
    in_group = jnp.arange(packed) < group
    heads = kv_head * group + jnp.arange(packed)
    if config.triggers:
        heads = trigger(heads)
    dims = jnp.arange(head_dim)[None, :]
    cos = pltriton.load(cos_ref.at[row, dims % (head_dim // 2)])
    sin = pltriton.load(sin_ref.at[row, dims % (head_dim // 2)])
    sin = jnp.where(dims < head_dim // 2, -sin, sin)

    def load_rotated(heads, mask):
        """Heads of the new token; dimension i turns with its partner half a head away."""
        partner = (dims + head_dim // 2) % head_dim
        own = pltriton.load(qkv_ref.at[row, heads[:, None], dims], mask=mask, other=0.0)
        other = pltriton.load(qkv_ref.at[row, heads[:, None], partner], mask=mask, other=0.0)
        rotated = own.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin
        return rotated.astype(qkv_ref.dtype)

    one = jnp.arange(1)
    key_head = group * num_kv_heads + kv_head + one
    has_token = jnp.broadcast_to(kv_len > 0, (1, 1))
    q = load_rotated(heads, in_group[:, None])
    new_k = load_rotated(key_head, has_token)
    new_v = pltriton.load(
        qkv_ref.at[row, (key_head + num_kv_heads)[:, None], dims], mask=has_token, other=0.0
    )

    def load_pages(tile):
        position = tile * block_kv + jnp.arange(block_kv)
        page = jax.lax.div(position, page_size)
        return pltriton.load(page_table_ref.at[row, page], mask=position < num_cached, other=0)

    @pl.when((split == 0) & (kv_len > 0))
    def _write_new_token():
        page = page_table_ref[row, jax.lax.div(num_cached, page_size)]
        key_row = (page * (2 * num_kv_heads) + kv_head) * page_size
        key_row += jax.lax.rem(num_cached, page_size)
        value_row = key_row + num_kv_heads * page_size
        pltriton.store(new_kv_ref.at[(key_row + one)[:, None], dims], new_k)
        pltriton.store(new_kv_ref.at[(value_row + one)[:, None], dims], new_v)

    def attend_tile(tile, carry):
        # The ids of the next tile's pages are fetched one tile ahead: then the address of a key
        # is known when its tile begins, and the compiler can keep several tiles in flight.
        page, row_max, row_sum, acc = carry
        next_page = load_pages(tile + 1)
        position = tile * block_kv + jnp.arange(block_kv)
        valid = position < num_cached
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

    # The new token is not read back from its page: it is where the first split begins.
    takes_new = (split == 0) & (kv_len > 0)
    new_score = (q.astype(jnp.float32) * new_k.astype(jnp.float32)).sum(axis=1)
    _, row_max, row_sum, acc = jax.lax.fori_loop(
        first,
        last,
        attend_tile,
        (
            load_pages(first),
            jnp.where(takes_new, new_score, -jnp.inf),
            jnp.where(takes_new, jnp.ones(packed, jnp.float32), 0.0),
            jnp.where(takes_new, jnp.broadcast_to(new_v, (packed, head_dim)), 0.0).astype(
                jnp.float32
            ),
        ),
    )
    out = acc / jnp.where(row_sum > 0, row_sum, 1.0)[:, None]

    def store_out(out):
        where = out_ref.at[row, heads[:, None], dims]
        pltriton.store(where, out.astype(out_ref.dtype), mask=in_group[:, None])

    if num_splits == 1:
        store_out(out)
        return
    num_live = _num_live_splits(num_cached, num_splits, config)
    pl.when((num_live == 1) & (split == 0))(lambda: store_out(out))

    @pl.when((num_live > 1) & (split < num_live))
    def _store_partial():
        where = partial_ref.at[row, split, heads[:, None], dims]
        pltriton.store(where, out, mask=in_group[:, None])
        lse = row_max * (scale * _LOG2_E) + jnp.log2(row_sum)
        pltriton.store(lse_ref.at[row, split, heads], lse, mask=in_group)
        pltriton.debug_barrier()  # the whole program has stored before it says so
        num_arrived = pltriton.atomic_add(arrivals_ref, (row, kv_head), 1)

        @pl.when(num_arrived == num_live - 1)
        def _combine():
            arrivals_ref[row, kv_head] = 0
            store_out(_combined(partial_ref, lse_ref, row, heads, in_group, num_live))


def _name_refs(refs: tuple[jax.Array, ...], num_splits: int) -> tuple[jax.Array | None, ...]:
    """What a kernel has beside its inputs: with splits also counters [B, K] and partials."""
    if num_splits == 1:
        out_ref, new_kv_ref = refs
        return None, out_ref, new_kv_ref, None, None
    return refs  # arrivals, out, new_kv, partial [B, splits, N, H], lse [B, splits, N]


def _combined(
    partial_ref: jax.Array,
    lse_ref: jax.Array,
    row: jax.Array,
    heads: jax.Array,
    in_group: jax.Array,
    num_live: jax.Array,
) -> jax.Array:
    """The partials of all live splits as one, in the order of the splits, whoever came last."""
    num_splits, head_dim = partial_ref.shape[1], partial_ref.shape[-1]
    dims = jnp.arange(head_dim)

    def load_lse(splits):
        mask = (splits < num_live)[:, None] & in_group[None, :]
        where = lse_ref.at[row, splits[:, None], heads[None, :]]
        return pltriton.load(where, mask=mask, other=-jnp.inf, volatile=True)

    lse = load_lse(jnp.arange(num_splits))
    top = jnp.where(in_group, lse.max(axis=0), 0.0)
    total = jnp.exp2(lse - top[None, :]).sum(axis=0)

    def add(i, acc):
        splits = i * _COMBINED_AT_ONCE + jnp.arange(_COMBINED_AT_ONCE)
        mask = (splits < num_live)[:, None] & in_group[None, :]
        partial = pltriton.load(
            partial_ref.at[row, splits[:, None, None], heads[None, :, None], dims[None, None, :]],
            mask=mask[:, :, None],
            other=0.0,
            volatile=True,
        )
        weights = jnp.exp2(load_lse(splits) - top[None, :])
        return acc + (weights[:, :, None] * partial).sum(axis=0)

    acc = jnp.zeros((heads.shape[0], head_dim), jnp.float32)
    acc = jax.lax.fori_loop(0, pl.cdiv(num_live, _COMBINED_AT_ONCE), add, acc)
    return acc / jnp.where(in_group, total, 1.0)[:, None]


def _split_tiles(num_cached: jax.Array, num_splits: int, config: TuningConfig) -> jax.Array:
    num_tiles = pl.cdiv(num_cached, config.block_kv)
    return jnp.maximum(pl.cdiv(num_tiles, num_splits), config.min_split_tiles)


def _split_range(
    num_cached: jax.Array, split: jax.Array, num_splits: int, config: TuningConfig
) -> tuple[jax.Array, jax.Array]:
    """Tiles [first, last) of a split; empty when the row needs fewer splits."""
    split_tiles = _split_tiles(num_cached, num_splits, config)
    first = split * split_tiles
    return first, jnp.minimum(first + split_tiles, pl.cdiv(num_cached, config.block_kv))


def _num_live_splits(num_cached: jax.Array, num_splits: int, config: TuningConfig) -> jax.Array:
    """Splits that have something to read; the first is always live."""
    num_tiles = pl.cdiv(num_cached, config.block_kv)
    return jnp.maximum(pl.cdiv(num_tiles, _split_tiles(num_cached, num_splits, config)), 1)


@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret", "chunk"))
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
    prefetch: jax.Array | None = None,
    chunk: int = 8192,
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
    if num_splits == 1:
        prefetch = None
    extra = 0
    if prefetch is not None:
        inputs.append(prefetch.reshape(-1))
        extra = -(-prefetch.size // (chunk * batch * num_kv_heads))
    if num_splits > 1:
        # NOTE: the kernel counts in this input, and leaves it as it was, all zero: XLA may give
        # the same zeros to every call, which run one after another.
        inputs.append(jnp.zeros((batch, num_kv_heads), jnp.int32))
        partial_shape = (batch, num_splits, num_heads, head_dim)
        outputs.append(jax.ShapeDtypeStruct(partial_shape, jnp.float32))
        outputs.append(jax.ShapeDtypeStruct(partial_shape[:-1], jnp.float32))
    if prefetch is not None:
        outputs.append(jax.ShapeDtypeStruct((1,), jnp.float32))
    kernel = functools.partial(
        _decode_kernel,
        prefetch=0 if prefetch is None else chunk,
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
    out, flat, *_ = pl.pallas_call(
        kernel,
        grid=(num_kv_heads, batch, num_splits + extra),
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
