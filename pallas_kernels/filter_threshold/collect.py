"""A pass over a row for the Triton kernels: tokens around a bracket, counted and collected."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.filter_threshold.bracket import Blocks, TuningConfig, all_sum, num_true
from pallas_kernels.triton_math import exp_tempered, float_of_order, inverse_of
from pallas_kernels.vocab_blocks import BLOCK


class Counts(NamedTuple):
    """What a pass over (a part of) the active blocks found.

    Attributes:
      above: Tokens above the bracket.
      mass_above: Their mass.
      found: Tokens inside.
      mass_found: Their mass.
    """

    above: jax.Array
    mass_above: jax.Array
    found: jax.Array
    mass_found: jax.Array


def store_active(blocks: Blocks, low: jax.Array, ids_ref) -> jax.Array:
    """Writes the blocks that have a token from `low` up, and returns how many they are."""
    is_active = blocks.tops >= low
    place = jnp.cumsum(is_active.astype(jnp.int32)) - 1
    # What is not stored points past the end: in the interpreter it would else undo what is.
    place = jnp.where(is_active, place, ids_ref.shape[1])
    pltriton.store(ids_ref.at[blocks.row, place], blocks.ids, mask=is_active)
    return num_true(is_active)


def collect_kernel(
    logits_ref,  # [B, V]
    top_ref,  # [B], the largest logits
    inverses_ref,  # [B] or [1], of the temperatures
    low_ref,  # [B]
    high_ref,  # [B]
    ids_ref,  # [B, blocks]
    num_active_ref,  # [B]
    above_ref,  # [B, splits]
    mass_above_ref,  # [B, splits]
    num_found_ref,  # [B, splits]
    mass_found_ref,  # [B, splits]
    found_ref,  # [B, max_found], a part for each split
    *,
    config: TuningConfig,
    interpret: bool,
):
    """Looks at a part of a row, the split's own."""
    row, split = pl.program_id(0), pl.program_id(1)
    counts = collect(
        row,
        (float_of_order(low_ref[row]), float_of_order(high_ref[row])),
        (top_ref[row], inverse_of(inverses_ref, row)),
        (logits_ref, ids_ref, found_ref),
        num_active_ref[row],
        (split, config.num_splits),
        config,
        interpret=interpret,
    )
    above_ref[row, split], mass_above_ref[row, split] = counts.above, counts.mass_above
    num_found_ref[row, split], mass_found_ref[row, split] = counts.found, counts.mass_found


def collect(
    row: jax.Array,
    bounds: tuple[jax.Array, jax.Array],
    scale: tuple[jax.Array, jax.Array],
    refs,
    num_active: jax.Array,
    share: tuple[jax.Array | int, int],
    config: TuningConfig,
    *,
    interpret: bool,
) -> Counts:
    """Counts tokens and writes those of the bracket, in one pass over the active blocks.

    Args:
      row: Its index.
      bounds: low and high.
      scale: The largest logit, and the inverse of the temperature.
      refs: The logits, the active blocks' ids, and where tokens are written.
      num_active: Active blocks.
      share: (i, n), every n-th tile from the i-th; tokens go to the i-th of n parts.
      config: Tile parameters.
      interpret: Whether the interpreter runs the program.
    """
    (low, high), (top, inverse) = bounds, scale
    logits_ref, ids_ref, found_ref = refs
    part, num_parts = share
    capacity = config.max_found // num_parts
    lane = jnp.arange(BLOCK)[None, :]

    def load(i: jax.Array) -> jax.Array:
        slot = (part + i * num_parts) * config.tile_blocks + jnp.arange(config.tile_blocks)
        is_here = slot < num_active
        block = pltriton.load(ids_ref.at[row, slot], mask=is_here, other=0)
        index = block[:, None] * BLOCK + lane
        is_token = is_here[:, None] & (index < logits_ref.shape[1])
        return pltriton.load(logits_ref.at[row, index], mask=is_token, other=-jnp.inf)

    def scan_tile(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, num_found, above, mass_above, mass_found = carry
        following = load(i + 1)
        weights = exp_tempered(x, top, inverse, interpret=interpret)
        is_above = x >= high
        is_found = (x >= low) & ~is_above
        # Column by column: where all blocks of one are a thread's, only one sum goes over the warp.
        within = jnp.cumsum(is_found.astype(jnp.int32), axis=0)
        totals = is_found.astype(jnp.int32).sum(axis=0)
        before = num_found - 1 + jnp.cumsum(totals) - totals
        place = before[None, :] + within
        is_stored = is_found & (place < capacity)
        place = part * capacity + place
        if interpret:  # there even what is not stored has a place
            place = jnp.where(is_stored, place, config.max_found)
        pltriton.store(found_ref.at[row, place], x, mask=is_stored)
        return (
            following,
            num_found + totals.sum(axis=0),
            above + is_above.astype(jnp.int32).sum(axis=0),
            mass_above + jnp.where(is_above, weights, 0.0).sum(axis=0),
            mass_found + jnp.where(is_found, weights, 0.0).sum(axis=0),
        )

    zeros = jnp.zeros(BLOCK, jnp.float32)
    start = (load(jnp.int32(0)), jnp.int32(0), jnp.zeros(BLOCK, jnp.int32), zeros, zeros)
    num_tiles = pl.cdiv(num_active, config.tile_blocks)
    rounds = jax.lax.div(num_tiles - part + num_parts - 1, jnp.int32(num_parts))
    _, found, above, mass_above, mass_found = jax.lax.fori_loop(
        jnp.int32(0), rounds, scan_tile, start
    )
    return Counts(all_sum(above), all_sum(mass_above), found, all_sum(mass_found))
