"""The threshold of the filters as a Pallas Triton kernel: a bracket is guessed, proved, searched.

One program serves one row. Largest logit and probability mass of the row come from a pass over its
blocks (`vocab_blocks`), and so does a bracket [low, high) around the threshold:

- Where the filters keep little, from the block maxima alone: if k of them are at least t, so are k
  tokens, and likewise for the mass. Only blocks whose maximum reaches `low` are then looked at.
- Else from a sample of the row: the tokens below t are many and of little weight each, so their
  count and mass are estimated well, with a known error; low and high are that error apart.

One pass over the blocks that matter then counts what lies above the bracket, which proves or
refutes it, and collects what lies inside; a threshold among those is found in registers. A refuted
bracket, which is rare, or one with too many tokens (of equal logits, say) is halved, pass by pass.

Nothing depends on the other rows or on the order in which programs run.

Source: the proof by counting is that of pivot methods, e.g. Qrita, arXiv:2602.01518.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.triton_math import float_of_order, order_of_float
from pallas_kernels.vocab_blocks import BLOCK, LOWEST, block_sums

MAX_BLOCKS = 4096
"""Blocks of a row whose maxima one program holds at once."""

_LOWEST_ORDER = int(np.float32(LOWEST).view(np.int32)) ^ 0x7FFFFFFF
_PIECE = 8  # tokens of one memory sector, the unit of a sample
_FEW = 16  # sampled tokens above a threshold, below which an estimate is not trusted


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters of the kernel.

    Attributes:
      tile_blocks: Blocks of the vocabulary read at once; a power of two.
      max_found: Tokens that a bracket may hold; a power of two.
      sample_pieces: Runs of 8 tokens in the sample; a power of two.
      few_blocks: Share of the blocks up to which no sample is taken.
      num_halvings: Steps of the coarse searches over block maxima and sample.
      num_errors: Standard errors between an estimate and its bound.
      num_warps: Warps per program.
      num_stages: Depth of the software pipeline.
    """

    tile_blocks: int = 32
    max_found: int = 8192
    sample_pieces: int = 1024
    few_blocks: float = 0.25
    num_halvings: int = 12
    num_errors: float = 4.0
    num_warps: int = 8
    num_stages: int = 1


class _Row(NamedTuple):
    """What a program knows of its row from the start.

    Attributes:
      row: Index.
      top_k: Tokens that suffice; 0 where top-k is off.
      mass: Sum of exp(logit - max) that suffices; infinite where top-p is off.
      max: The largest logit.
      total: Sum of exp(logit - max).
      blocks: Index of every block, padded to a power of two.
      tops: Maximum of every block; -inf in the padding.
    """

    row: jax.Array
    top_k: jax.Array
    mass: jax.Array
    max: jax.Array
    total: jax.Array
    blocks: jax.Array
    tops: jax.Array

    def is_enough(self, count: jax.Array, mass: jax.Array) -> jax.Array:
        """Whether this many tokens of this mass hold all that the filters keep."""
        return ((self.top_k > 0) & (count >= self.top_k)) | (mass >= self.mass)

    def weights(self, logits: jax.Array) -> jax.Array:
        return jnp.exp(logits - self.max)


class _Search(NamedTuple):
    """Bounds of the threshold, and the bracket that the last pass looked into; all by
    `order_of_float`.

    Attributes:
      proved_low: The threshold is this or above.
      proved_high: The threshold is below.
      low: Of the bracket.
      high: Of the bracket.
      count_above: Tokens from `high` up.
      mass_above: Their mass.
      num_found: Tokens in the bracket.
      is_open: 1 until the bracket is proved and its tokens are collected.
    """

    proved_low: jax.Array
    proved_high: jax.Array
    low: jax.Array
    high: jax.Array
    count_above: jax.Array
    mass_above: jax.Array
    num_found: jax.Array
    is_open: jax.Array


class _Scratch(NamedTuple):
    """Memory that the threads of a program exchange values through.

    Attributes:
      ids: [B, blocks], blocks to look at.
      found: [B, max_found], tokens of the bracket.
      barrier: What was written before is read after.
    """

    ids: Any
    found: Any
    barrier: Callable[[], None]


def _middle(low: jax.Array, high: jax.Array) -> jax.Array:
    return (low >> 1) + (high >> 1) + (low & high & 1)


def _sum(x: jax.Array) -> jax.Array:
    while x.ndim:
        x = x.sum(axis=x.ndim - 1)
    return x


def _count(mask: jax.Array) -> jax.Array:
    return _sum(mask.astype(jnp.int32))


def _kernel(
    logits_ref,  # [B, V]
    tops_ref,  # [B, blocks]
    sums_ref,  # [B, blocks]
    top_k_ref,  # [B]
    top_p_ref,  # [B]
    min_p_ref,  # [B]
    out_ref,  # [B]
    ids_ref,  # [B, blocks], scratch
    found_ref,  # [B, max_found], scratch
    *,
    config: TuningConfig,
    interpret: bool,
):
    index = pl.program_id(0)
    barrier = (lambda: None) if interpret else pltriton.debug_barrier
    scratch = _Scratch(ids_ref, found_ref, barrier)
    num_blocks, vocab_size = tops_ref.shape[1], logits_ref.shape[1]
    blocks = jnp.arange(pl.next_power_of_2(num_blocks))
    is_block = blocks < num_blocks
    tops = pltriton.load(tops_ref.at[index, blocks], mask=is_block, other=-jnp.inf)
    sums = pltriton.load(sums_ref.at[index, blocks], mask=is_block, other=0.0)
    top = tops.max(axis=0)
    total = (sums * jnp.exp(tops - top)).sum(axis=0)
    top_k, top_p = top_k_ref[index], top_p_ref[index]
    has_k, has_p = (top_k >= 1) & (top_k < vocab_size), top_p < 1
    row = _Row(
        row=index,
        top_k=jnp.where(has_k, top_k, 0),
        mass=jnp.where(has_p, top_p * total, jnp.inf),
        max=top,
        total=total,
        blocks=blocks,
        tops=tops,
    )
    # False for NaN, which the draw reports.
    is_searched = (has_k | has_p) & (total > 0) & (total < jnp.inf)

    low, is_bounded = _from_blocks(row, is_searched.astype(jnp.int32) * config.num_halvings)
    if vocab_size > config.max_found:
        is_few = _count(tops >= low) <= int(config.few_blocks * num_blocks)
        low, high = jax.lax.cond(
            (is_bounded & is_few) | ~is_searched,
            lambda: (low, top),
            lambda: _from_sample(row, logits_ref, config),
        )
    else:
        low, high = jnp.where(is_bounded, low, LOWEST), top
    search = _Search(
        proved_low=jnp.int32(_LOWEST_ORDER),
        proved_high=order_of_float(top) + 1,
        low=order_of_float(low),
        high=order_of_float(high) + 1,
        count_above=jnp.int32(0),
        mass_above=jnp.float32(0),
        num_found=jnp.int32(0),
        is_open=is_searched.astype(jnp.int32),
    )
    search = jax.lax.while_loop(
        lambda search: search.is_open > 0,
        lambda search: _look(row, search, logits_ref, scratch, config),
        search,
    )
    found = _finish(row, search, scratch, config)
    found = jnp.where(is_searched, found, -jnp.inf)
    out_ref[index] = jnp.maximum(found, top + jnp.log(min_p_ref[index]))


def _from_blocks(row: _Row, num_halvings: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A threshold that the block maxima alone are enough for, and whether there is one."""
    weights = row.weights(row.tops)

    def is_enough(t: jax.Array) -> jax.Array:
        is_above = row.tops >= t
        return row.is_enough(_count(is_above), _sum(jnp.where(is_above, weights, 0.0)))

    def halve(_: jax.Array, bounds: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, is_bounded = bounds
        middle = 0.5 * low + 0.5 * high
        is_low = is_enough(middle)
        return (
            jnp.where(is_low, middle, low),
            jnp.where(is_low, high, middle),
            jnp.where(is_low, 1, is_bounded),
        )

    lowest = jnp.where(row.tops > LOWEST, row.tops, row.max).min(axis=0)
    low, _, is_bounded = jax.lax.fori_loop(
        jnp.int32(0), num_halvings, halve, (lowest, row.max, jnp.int32(0))
    )
    return low, is_bounded > 0


def _sample_index(vocab_size: int, num_pieces: int) -> tuple[jax.Array, int]:
    """Places of the sample, spread over the row, and how many of them are tokens."""

    def places(xp):
        piece = xp.arange(num_pieces, dtype=xp.int32)
        block = piece * num_blocks // num_pieces
        return block * BLOCK + piece * 5 % (BLOCK // _PIECE) * _PIECE

    num_blocks = -(-vocab_size // BLOCK)
    size = np.count_nonzero(places(np)[:, None] + np.arange(_PIECE) < vocab_size)
    return places(jnp)[:, None] + jnp.arange(_PIECE)[None, :], int(size)


def _from_sample(row: _Row, logits_ref, config: TuningConfig) -> tuple[jax.Array, jax.Array]:
    """Bounds [low, high] between which the threshold almost surely is."""
    vocab_size = logits_ref.shape[1]
    index, size = _sample_index(vocab_size, config.sample_pieces)
    sample = pltriton.load(logits_ref.at[row.row, index], mask=index < vocab_size, other=-jnp.inf)
    weights = row.weights(sample)
    share = vocab_size / size

    def is_enough(t: jax.Array, sign: float) -> jax.Array:
        """By estimates `sign * num_errors` standard errors off."""
        is_above = sample >= t
        count = _count(is_above).astype(jnp.float32)
        below = jnp.where(is_above, 0.0, weights)
        # As if one more token were at the threshold: what was seen never is not impossible.
        count_error = jnp.sqrt(count + 1.0)
        mass_error = jnp.sqrt(_sum(below * below) + jnp.square(row.weights(t)))
        off = sign * config.num_errors
        count_bound = share * (count + off * count_error)
        mass_bound = row.total - share * (_sum(below) - off * mass_error)
        has_k = (row.top_k > 0) & (count_bound >= row.top_k.astype(jnp.float32))
        is_known = (count >= _FEW) | (sign > 0)
        return is_known & (has_k | (mass_bound >= row.mass))

    def halve(_: jax.Array, bounds: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        surely, rather, perhaps, hardly, is_bounded = bounds
        t, u = 0.5 * surely + 0.5 * rather, 0.5 * perhaps + 0.5 * hardly
        is_sure, is_possible = is_enough(t, -1.0), is_enough(u, 1.0)
        return (
            jnp.where(is_sure, t, surely),
            jnp.where(is_sure, rather, t),
            jnp.where(is_possible, u, perhaps),
            jnp.where(is_possible, hardly, u),
            jnp.where(is_sure, 1, is_bounded),
        )

    lowest = _min(jnp.where(sample > -jnp.inf, sample, row.max))
    start = (lowest, row.max, lowest, row.max, jnp.int32(0))
    low, _, _, high, is_bounded = jax.lax.fori_loop(0, config.num_halvings, halve, start)
    low = jnp.where(is_bounded > 0, low, LOWEST)
    return low, jnp.maximum(low, high)


def _min(x: jax.Array) -> jax.Array:
    while x.ndim:
        x = x.min(axis=x.ndim - 1)
    return x


def _look(
    row: _Row, search: _Search, logits_ref, scratch: _Scratch, config: TuningConfig
) -> _Search:
    """One pass: proves or refutes the bracket and collects what is in it."""
    count, mass, num_found, mass_found = _collect(
        row,
        float_of_order(search.low),
        float_of_order(search.high),
        logits_ref,
        scratch,
        config,
    )
    is_low = (search.low <= search.proved_low) | row.is_enough(count + num_found, mass + mass_found)
    is_high = (search.high >= search.proved_high) | ~row.is_enough(count, mass)
    proved_low = jnp.where(is_high, jnp.where(is_low, search.low, search.proved_low), search.high)
    proved_high = jnp.where(is_low, jnp.where(is_high, search.high, search.proved_high), search.low)
    is_found = is_low & is_high & (num_found <= config.max_found)
    # Between neighbours there are only tokens that are equal.
    is_found |= is_low & is_high & (proved_high == proved_low + 1)
    middle = _middle(proved_low, proved_high)
    return _Search(
        proved_low=proved_low,
        proved_high=proved_high,
        low=jnp.where(is_found | (proved_high == proved_low + 1), proved_low, middle),
        high=proved_high,
        count_above=count,
        mass_above=mass,
        num_found=num_found,
        is_open=(~is_found).astype(jnp.int32),
    )


def _collect(
    row: _Row,
    low: jax.Array,
    high: jax.Array,
    logits_ref,
    scratch: _Scratch,
    config: TuningConfig,
) -> tuple[jax.Array, ...]:
    """Writes the tokens in [low, high) to `found_ref`.

    Returns:
      Count and mass of the tokens from `high` up, then count and mass of those in between.
    """
    vocab_size = logits_ref.shape[1]
    is_active = row.tops >= low
    place = jnp.cumsum(is_active.astype(jnp.int32)) - 1
    scratch.barrier()  # an earlier pass may still be reading
    # What is not stored points past the end: in the interpreter it would else undo what is.
    place = jnp.where(is_active, place, scratch.ids.shape[1])
    pltriton.store(scratch.ids.at[row.row, place], row.blocks, mask=is_active)
    scratch.barrier()
    num_active = _count(is_active)
    lane = jnp.arange(BLOCK)[None, :]

    def load(tile: jax.Array) -> jax.Array:
        slot = tile * config.tile_blocks + jnp.arange(config.tile_blocks)
        is_here = slot < num_active
        block = pltriton.load(scratch.ids.at[row.row, slot], mask=is_here, other=0)
        index = block[:, None] * BLOCK + lane
        is_token = is_here[:, None] & (index < vocab_size)
        return pltriton.load(logits_ref.at[row.row, index], mask=is_token, other=-jnp.inf)

    def scan_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, num_found, count, mass, mass_found = carry
        following = load(tile + 1)
        weights = row.weights(x)
        is_above = x >= high
        is_found = (x >= low) & ~is_above
        within = jnp.cumsum(is_found.astype(jnp.int32), axis=1)
        totals = is_found.astype(jnp.int32).sum(axis=1)
        before = num_found + jnp.cumsum(totals) - totals
        place = jnp.where(is_found, before[:, None] + within - 1, config.max_found)
        is_stored = place < config.max_found
        pltriton.store(scratch.found.at[row.row, place], x, mask=is_stored)
        return (
            following,
            num_found + totals.sum(axis=0),
            count + is_above.astype(jnp.int32),
            mass + jnp.where(is_above, weights, 0.0),
            mass_found + jnp.where(is_found, weights, 0.0),
        )

    shape = (config.tile_blocks, BLOCK)
    zeros = jnp.zeros(shape, jnp.float32)
    start = (load(jnp.int32(0)), jnp.int32(0), jnp.zeros(shape, jnp.int32), zeros, zeros)
    num_tiles = pl.cdiv(num_active, config.tile_blocks)
    _, num_found, count, mass, mass_found = jax.lax.fori_loop(
        jnp.int32(0), num_tiles, scan_tile, start
    )
    scratch.barrier()
    return _sum(count), _sum(mass), num_found, _sum(mass_found)


def _finish(row: _Row, search: _Search, scratch: _Scratch, config: TuningConfig) -> jax.Array:
    """The threshold, among the tokens that were collected."""
    place = jnp.arange(config.max_found)
    found = pltriton.load(
        scratch.found.at[row.row, place], mask=place < search.num_found, other=-jnp.inf
    )
    weights = row.weights(found)

    def halve(bounds: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, count_low, count_high = bounds
        middle = _middle(low, high)
        is_above = found >= float_of_order(middle)
        count = _count(is_above)
        mass = _sum(jnp.where(is_above, weights, 0.0))
        is_low = row.is_enough(search.count_above + count, search.mass_above + mass)
        return (
            jnp.where(is_low, middle, low),
            jnp.where(is_low, high, middle),
            jnp.where(is_low, count, count_low),
            jnp.where(is_low, count_high, count),
        )

    low, *_ = jax.lax.while_loop(
        lambda bounds: (bounds[1] != bounds[0] + 1) & (bounds[2] - bounds[3] > 1),
        halve,
        (search.low, search.high, search.num_found, jnp.int32(0)),
    )
    # One token is left from `low` up to its bound, or several that are equal; or none, where the
    # sum over all tokens is by rounding less than what top-p near 1 asks for.
    nothing = float_of_order(search.high)
    return jnp.where(found >= float_of_order(low), found, nothing).min(axis=0)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def filter_threshold(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    *,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> Float[Array, " B"]:
    """Finds the threshold of each row; see `api.filter_threshold`.

    Args:
      config: Tile parameters; None takes the defaults.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    config = config or TuningConfig()
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // BLOCK)
    if num_blocks > MAX_BLOCKS:
        raise NotImplementedError(f"{vocab_size} tokens are more than {MAX_BLOCKS * BLOCK}")
    sums = block_sums(logits)
    out, _, _ = pl.pallas_call(
        functools.partial(_kernel, config=config, interpret=interpret),
        grid=(num_rows,),
        out_shape=(
            jax.ShapeDtypeStruct((num_rows,), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, num_blocks), jnp.int32),
            jax.ShapeDtypeStruct((num_rows, config.max_found), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=8 * logits.size,
            transcendentals=logits.size,
            bytes_accessed=logits.size * logits.dtype.itemsize,
        ),
        interpret=interpret,
        name="filter_threshold",
    )(logits, sums.max, sums.sum, top_k, top_p, min_p)
    return out
