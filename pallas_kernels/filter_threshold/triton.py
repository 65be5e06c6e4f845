"""The threshold of the filters as Pallas Triton kernels: a bracket is guessed, proved, searched.

Largest logit and probability mass of a row come from a pass over its blocks (`vocab_blocks`). Then

1. one program a row guesses a bracket [low, high) around the threshold:
   - where the filters keep little, from the block maxima alone: if k of them are at least t, so are
     k tokens, and likewise for the mass. Only blocks whose maximum reaches `low` are looked at.
   - else from a sample of the row: the tokens below t are many and of little weight each, so their
     count and mass are estimated well, with a known error; low and high are that error apart.
2. several programs a row count what lies above the bracket and collect what lies inside.
3. one program a row adds the counts, which proves or refutes the bracket, and finds the threshold
   among what was collected, in registers. A refuted bracket, which is rare, or one with too many
   tokens (of equal logits, say) is halved, pass by pass.

Nothing depends on the other rows or on the order in which programs run.

Source: the proof by counting is that of pivot methods, e.g. Qrita, arXiv:2602.01518.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.filter_threshold.bracket import (
    LOWEST_ORDER,
    Row,
    TuningConfig,
    all_sum,
    guess,
    load_blocks,
    num_true,
    row_of,
    total_of,
)
from pallas_kernels.filter_threshold.collect import (
    Counts,
    collect,
    collect_kernel,
    store_active,
)
from pallas_kernels.triton_math import float_of_order, inverse_of, inverses
from pallas_kernels.vocab_blocks import BLOCK, BlockSums, block_sums

MAX_BLOCKS = 4096
"""Blocks of a row whose maxima one program holds at once."""


class _Search(NamedTuple):
    """Bounds of the threshold, and the bracket that the last pass looked into; all by
    `order_of_float`.

    Attributes:
      proved_low: The threshold is this or above.
      proved_high: The threshold is below.
      low: Of the bracket.
      high: Of the bracket.
      above: Tokens from `high` up: their count.
      mass_above: Their mass.
      num_found: Tokens in the bracket.
      is_open: 1 until the bracket is proved and its tokens are collected.
      num_passes: Passes of this program.
    """

    proved_low: jax.Array
    proved_high: jax.Array
    low: jax.Array
    high: jax.Array
    above: jax.Array
    mass_above: jax.Array
    num_found: jax.Array
    is_open: jax.Array
    num_passes: jax.Array


def _guess_kernel(
    logits_ref,  # [B, V]
    tops_ref,  # [B, blocks]
    sums_ref,  # [B, blocks]
    inverses_ref,  # [B] or [1], of the temperatures
    top_k_ref,  # [B]
    top_p_ref,  # [B]
    top_ref,  # [B], the largest logits
    total_ref,  # [B], sums of weights
    low_ref,  # [B]
    high_ref,  # [B]
    ids_ref,  # [B, blocks], the active blocks
    num_active_ref,  # [B]
    *,
    config: TuningConfig,
    interpret: bool,
):
    i = pl.program_id(0)
    blocks, inverse = load_blocks(tops_ref, i), inverse_of(inverses_ref, i)
    top_ref[i] = top = blocks.tops.max(axis=0)
    total_ref[i] = total = total_of(blocks, sums_ref, inverse, interpret)
    filters = top_k_ref[i], top_p_ref[i]
    row = row_of(i, top, total, inverse, filters, logits_ref.shape[1], interpret)
    low_ref[i], high_ref[i] = low, _ = guess(row, blocks.tops, logits_ref, config)
    active = store_active(blocks, float_of_order(low), ids_ref)
    num_active_ref[row.index] = jnp.where(row.is_searched, active, 0)


def _finish_kernel(
    logits_ref,  # [B, V]
    tops_ref,  # [B, blocks]
    inverses_ref,  # [B] or [1], of the temperatures
    top_k_ref,  # [B]
    top_p_ref,  # [B]
    min_p_ref,  # [B]
    top_ref,  # [B], the largest logits
    total_ref,  # [B], sums of weights
    low_ref,  # [B]
    high_ref,  # [B]
    above_ref,  # [B, splits]
    mass_above_ref,  # [B, splits]
    num_found_ref,  # [B, splits]
    mass_found_ref,  # [B, splits]
    found_ref,  # [B, max_found], a part for each split
    out_ref,  # [B]
    ids_ref,  # [B, blocks], scratch of this program's own passes
    refound_ref,  # [B, max_found], likewise
    *,
    config: TuningConfig,
    interpret: bool,
):
    i = pl.program_id(0)
    inverse, filters = inverse_of(inverses_ref, i), (top_k_ref[i], top_p_ref[i])
    row = row_of(i, top_ref[i], total_ref[i], inverse, filters, logits_ref.shape[1], interpret)
    barrier = (lambda: None) if interpret else pltriton.debug_barrier

    def look_again(search: _Search) -> _Search:
        low, high = float_of_order(search.low), float_of_order(search.high)
        barrier()  # an earlier pass may still be reading
        num_active = store_active(load_blocks(tops_ref, i), low, ids_ref)
        barrier()
        refs = (logits_ref, ids_ref, refound_ref)
        counts = collect(
            i,
            (low, high),
            (row.max, inverse),
            refs,
            num_active,
            (0, 1),
            config,
            interpret=interpret,
        )
        barrier()
        return _judged(row, search, counts, counts.found <= config.max_found)

    splits = jnp.arange(config.num_splits)
    parts = [
        pltriton.load(ref.at[i, splits])
        for ref in (above_ref, mass_above_ref, num_found_ref, mass_found_ref)
    ]
    most = parts[2].max(axis=0)
    fits = most <= config.capacity
    start = _Search(
        proved_low=jnp.int32(LOWEST_ORDER),
        proved_high=row.highest,
        low=low_ref[i],
        high=high_ref[i],
        above=jnp.int32(0),
        mass_above=jnp.float32(0),
        num_found=jnp.int32(0),
        is_open=jnp.int32(0),
        num_passes=jnp.int32(-1),
    )
    search = _judged(row, start, Counts(*(part.sum(axis=0) for part in parts)), fits)
    search = jax.lax.while_loop(
        lambda search: row.is_searched & (search.is_open > 0), look_again, search
    )
    is_again = search.num_passes > 0

    def found(width: int) -> jax.Array:
        place = jnp.arange(config.num_splits * width)
        split, inside = place // width, place % width
        is_found = inside < pltriton.load(num_found_ref.at[i, split])
        return pltriton.load(
            found_ref.at[i, split * config.capacity + inside],
            mask=is_found & ~is_again,
            other=-jnp.inf,
        )

    def among_many() -> jax.Array:
        place = jnp.arange(config.max_found)
        mask = (place < search.num_found) & is_again
        again = pltriton.load(refound_ref.at[i, place], mask=mask, other=-jnp.inf)
        return _threshold(row, search, jnp.maximum(found(config.capacity), again))

    few = config.capacity // 2
    threshold = jax.lax.cond(
        is_again | (most > few), among_many, lambda: _threshold(row, search, found(few))
    )
    threshold = jnp.where(row.is_searched, threshold, -jnp.inf)
    by_min_p = row.max + jnp.log(min_p_ref[i]) / inverse
    out_ref[i] = jnp.maximum(threshold, by_min_p)


def _judged(row: Row, search: _Search, counts: Counts, fits: jax.Array) -> _Search:
    """What a pass over the bracket proves, and where the next one looks if there is to be one."""
    is_low = (search.low <= search.proved_low) | row.is_enough(
        counts.above + counts.found, counts.mass_above + counts.mass_found
    )
    is_high = (search.high >= search.proved_high) | ~row.is_enough(counts.above, counts.mass_above)
    proved_low = jnp.where(is_high, jnp.where(is_low, search.low, search.proved_low), search.high)
    proved_high = jnp.where(is_low, jnp.where(is_high, search.high, search.proved_high), search.low)
    # Between neighbours there are only tokens that are equal: any of them will do.
    is_narrow = proved_high == proved_low + 1
    is_found = is_low & is_high & (fits | is_narrow)
    middle = (proved_low >> 1) + (proved_high >> 1) + (proved_low & proved_high & 1)
    return _Search(
        proved_low=proved_low,
        proved_high=proved_high,
        low=jnp.where(is_found | is_narrow, proved_low, middle),
        high=proved_high,
        above=counts.above,
        mass_above=counts.mass_above,
        num_found=counts.found,
        is_open=(~is_found).astype(jnp.int32),
        num_passes=search.num_passes + 1,
    )


def _threshold(row: Row, search: _Search, found: jax.Array) -> jax.Array:
    """The threshold, among the tokens that were collected."""
    weights = row.weights(found)

    def halve(bounds: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, count_low, count_high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        is_above = found >= float_of_order(middle)
        count = num_true(is_above)
        mass = all_sum(jnp.where(is_above, weights, 0.0))
        is_low = row.is_enough(search.above + count, search.mass_above + mass)
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
    sums: BlockSums | None = None,
    config: TuningConfig | None = None,
    interpret: bool = False,
) -> Float[Array, " B"]:
    """Finds the threshold of each row; see `api.filter_threshold`.

    Args:
      logits: Of each row.
      top_k: As in the op.
      top_p: As in the op.
      min_p: As in the op.
      sums: Of the blocks; None has XLA fuse them with what computes the logits.
      config: Tile parameters; None takes the defaults.
      interpret: Run in the Pallas interpreter, on any backend.
    """
    config = config or TuningConfig()
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // BLOCK)
    if num_blocks > MAX_BLOCKS:
        raise NotImplementedError(f"{vocab_size} tokens are more than {MAX_BLOCKS * BLOCK}")

    def call(kernel, grid, num_warps, passes, out_types, *args):
        return pl.pallas_call(
            functools.partial(kernel, config=config, interpret=interpret),
            grid=grid,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out_types],
            compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=1),
            cost_estimate=pl.CostEstimate(
                flops=int(8 * passes * logits.size),
                transcendentals=int(passes * logits.size),
                bytes_accessed=int(4 * passes * logits.size),
            ),
            interpret=interpret,
            name=f"filter_threshold_{kernel.__name__.strip('_').removesuffix('_kernel')}",
        )(*args)

    rows, splits, ints, floats = (num_rows,), (num_rows, config.num_splits), jnp.int32, jnp.float32
    blocks, found = ((num_rows, num_blocks), ints), ((num_rows, config.max_found), floats)
    if sums is None:
        sums = block_sums(logits, implementation="reference")
    scale = inverses(sums.temperature)
    top, total, low, high, ids, num_active = call(
        _guess_kernel,
        rows,
        config.guess_warps,
        0.1,
        [(rows, floats), (rows, floats), (rows, ints), (rows, ints), blocks, (rows, ints)],
        *(logits, sums.max, sums.sum, scale, top_k, top_p),
    )
    counts = call(
        collect_kernel,
        splits,
        config.collect_warps,
        1,
        [(splits, ints), (splits, floats), (splits, ints), (splits, floats), found],
        *(logits, top, scale, low, high, ids, num_active),
    )
    threshold, *_ = call(
        _finish_kernel,
        rows,
        config.finish_warps,
        0.1,
        [(rows, floats), blocks, found],
        *(logits, sums.max, scale, top_k, top_p, min_p, top, total, low, high, *counts),
    )
    return threshold
