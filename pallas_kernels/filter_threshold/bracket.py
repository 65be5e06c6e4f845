"""The guess of the Triton kernels: bounds of the threshold from block maxima or from a sample."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.triton_math import order_of_float
from pallas_kernels.vocab_blocks import BLOCK, LOWEST

LOWEST_ORDER = int(np.float32(LOWEST).view(np.int32)) ^ 0x7FFFFFFF
"""`order_of_float` of the lowest finite number."""

_PIECE = 8  # tokens of one memory sector, the unit of a sample
_FEW = 16  # sampled tokens above a threshold, below which an estimate is not trusted


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """Tile and launch parameters of the kernels.

    Attributes:
      tile_blocks: Blocks of the vocabulary read at once; a power of two.
      num_splits: Programs that collect the tokens of a row; a power of two. The same at every
        batch, for a row's sums are added in that order.
      max_found: Tokens that a bracket may hold; a power of two. Each split has its share of it.
      sample_pieces: Runs of 8 tokens in the sample; a power of two.
      few_blocks: Share of the blocks up to which no sample is taken.
      num_halvings: Steps of the searches over block maxima and sample.
      num_errors: Standard errors between an estimate and its bound.
      guess_warps: Warps of a program that guesses.
      collect_warps: Warps of a program that collects.
      finish_warps: Warps of a program that finishes.
    """

    tile_blocks: int = 8
    num_splits: int = 16
    max_found: int = 16384
    sample_pieces: int = 512
    few_blocks: float = 0.25
    num_halvings: int = 10
    num_errors: float = 4.0
    guess_warps: int = 4
    collect_warps: int = 4
    finish_warps: int = 16


class Row(NamedTuple):
    """What a program knows of its row.

    Attributes:
      index: Of the row.
      is_searched: Whether top-k or top-p is on; False for NaN, which the draw reports.
      top_k: Tokens that suffice; 0 where top-k is off.
      mass: Sum of exp(logit - max) that suffices; infinite where top-p is off.
      max: The largest logit.
      highest: A bound above it, as `order_of_float`.
      total: Sum of exp(logit - max).
      vocab_size: Tokens.
      blocks: Index of every block, padded to a power of two.
      tops: Maximum of every block; -inf in the padding.
    """

    index: jax.Array
    is_searched: jax.Array
    top_k: jax.Array
    mass: jax.Array
    max: jax.Array
    highest: jax.Array
    total: jax.Array
    vocab_size: int
    blocks: jax.Array
    tops: jax.Array

    def is_enough(self, count: jax.Array, mass: jax.Array) -> jax.Array:
        """Whether this many tokens of this mass hold all that the filters keep."""
        return ((self.top_k > 0) & (count >= self.top_k)) | (mass >= self.mass)

    def weights(self, logits: jax.Array) -> jax.Array:
        """Probabilities, but for the norm."""
        return jnp.exp(logits - self.max)


def all_sum(x: jax.Array) -> jax.Array:
    """The sum over all axes."""
    while x.ndim:
        x = x.sum(axis=x.ndim - 1)
    return x


def num_true(mask: jax.Array) -> jax.Array:
    """How many are True."""
    return all_sum(mask.astype(jnp.int32))


def load_row(tops_ref, sums_ref, top_k_ref, top_p_ref, vocab_size: int) -> Row:
    """Reads what is known of this program's row."""
    index = pl.program_id(0)
    num_blocks = tops_ref.shape[1]
    blocks = jnp.arange(pl.next_power_of_2(num_blocks))
    is_block = blocks < num_blocks
    tops = pltriton.load(tops_ref.at[index, blocks], mask=is_block, other=-jnp.inf)
    sums = pltriton.load(sums_ref.at[index, blocks], mask=is_block, other=0.0)
    top = tops.max(axis=0)
    total = (sums * jnp.exp(tops - top)).sum(axis=0)
    top_k, top_p = top_k_ref[index], top_p_ref[index]
    has_k, has_p = (top_k >= 1) & (top_k < vocab_size), top_p < 1
    return Row(
        index=index,
        is_searched=(has_k | has_p) & (total > 0) & (total < jnp.inf),
        top_k=jnp.where(has_k, top_k, 0),
        mass=jnp.where(has_p, top_p * total, jnp.inf),
        max=top,
        highest=order_of_float(top) + 1,
        total=total,
        vocab_size=vocab_size,
        blocks=blocks,
        tops=tops,
    )


def guess(row: Row, logits_ref, config: TuningConfig) -> tuple[jax.Array, jax.Array]:
    """Bounds [low, high) of the threshold that are almost surely right, as `order_of_float`."""
    low, is_bounded = _from_blocks(row, config)
    if row.vocab_size <= config.max_found // config.num_splits:
        return order_of_float(jnp.where(is_bounded, low, LOWEST)), row.highest
    is_few = num_true(row.tops >= low) <= int(config.few_blocks * logits_ref.shape[1] / BLOCK)
    low, high = jax.lax.cond(
        (is_bounded & is_few) | ~row.is_searched,
        lambda: (low, row.max),
        lambda: _from_sample(row, logits_ref, config),
    )
    return order_of_float(low), order_of_float(high) + 1


def _from_blocks(row: Row, config: TuningConfig) -> tuple[jax.Array, jax.Array]:
    """A threshold that the block maxima alone are enough for, and whether there is one."""
    weights = row.weights(row.tops)

    def halve(_: jax.Array, bounds: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, is_bounded = bounds
        middle = 0.5 * low + 0.5 * high
        is_above = row.tops >= middle
        is_low = row.is_enough(num_true(is_above), all_sum(jnp.where(is_above, weights, 0.0)))
        return (
            jnp.where(is_low, middle, low),
            jnp.where(is_low, high, middle),
            jnp.where(is_low, 1, is_bounded),
        )

    lowest = jnp.where(row.tops > LOWEST, row.tops, row.max).min(axis=0)
    num_halvings = row.is_searched.astype(jnp.int32) * config.num_halvings
    low, _, is_bounded = jax.lax.fori_loop(
        jnp.int32(0), num_halvings, halve, (lowest, row.max, jnp.int32(0))
    )
    return low, is_bounded > 0


def _from_sample(row: Row, logits_ref, config: TuningConfig) -> tuple[jax.Array, jax.Array]:
    """Bounds from estimates that are `num_errors` standard errors off, either way."""
    index, size = _sample_places(row.vocab_size, config.sample_pieces)
    is_token = index < row.vocab_size
    sample = pltriton.load(logits_ref.at[row.index, index], mask=is_token, other=-jnp.inf)
    weights = row.weights(sample)
    share = row.vocab_size / size

    def is_enough(t: jax.Array, sign: float) -> jax.Array:
        is_above = sample >= t
        count = num_true(is_above).astype(jnp.float32)
        below = jnp.where(is_above, 0.0, weights)
        # As if one more token were at the threshold: what was seen never is not impossible.
        count_error = jnp.sqrt(count + 1.0)
        mass_error = jnp.sqrt(all_sum(below * below) + jnp.square(row.weights(t)))
        off = sign * config.num_errors
        count_bound = share * (count + off * count_error)
        mass_bound = row.total - share * (all_sum(below) - off * mass_error)
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

    lowest = jnp.where(sample > -jnp.inf, sample, row.max).min(axis=1).min(axis=0)
    start = (lowest, row.max, lowest, row.max, jnp.int32(0))
    low, _, _, high, is_bounded = jax.lax.fori_loop(0, config.num_halvings, halve, start)
    low = jnp.where(is_bounded > 0, low, LOWEST)
    return low, jnp.maximum(low, high)


def _sample_places(vocab_size: int, num_pieces: int) -> tuple[jax.Array, int]:
    """Places of the sample, spread over the row, and how many of them are tokens."""
    num_blocks = -(-vocab_size // BLOCK)

    def places(xp):
        piece = xp.arange(num_pieces, dtype=xp.int32)
        block = piece * num_blocks // num_pieces
        return block * BLOCK + piece * 5 % (BLOCK // _PIECE) * _PIECE

    size = np.count_nonzero(places(np)[:, None] + np.arange(_PIECE) < vocab_size)
    return places(jnp)[:, None] + jnp.arange(_PIECE)[None, :], int(size)
