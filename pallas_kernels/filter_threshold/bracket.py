"""The guess of the Triton kernels: bounds of the threshold from block maxima or from a sample."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.triton_math import exp_tempered, order_of_float
from pallas_kernels.vocab_blocks import BLOCK, LOWEST

LOWEST_ORDER = int(np.float32(LOWEST).view(np.int32)) ^ 0x7FFFFFFF
"""`order_of_float` of the lowest finite number."""

_PIECE = 8  # tokens of one memory sector, the unit of a sample
_FEW = 16  # sampled tokens above a threshold, below which an estimate is not trusted
_TRIED = 8  # thresholds that a round of a search tries at once


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
      block_rounds: Rounds of the search over block maxima, each for three bits.
      sample_rounds: Likewise over the sample.
      num_errors: Standard errors between an estimate and its bound.
      guess_warps: Warps of a program that guesses.
      collect_warps: Warps of a program that collects; one alone waits for no other.
      finish_warps: Warps of a program that finishes.
    """

    tile_blocks: int = 4
    num_splits: int = 16
    max_found: int = 16384
    sample_pieces: int = 1024
    few_blocks: float = 0.25
    block_rounds: int = 2
    sample_rounds: int = 3
    num_errors: float = 4.0
    guess_warps: int = 8
    collect_warps: int = 1
    finish_warps: int = 16

    @property
    def capacity(self) -> int:
        """Tokens that a split may find."""
        return self.max_found // self.num_splits


class Row(NamedTuple):
    """What a program knows of its row.

    Attributes:
      index: Of the row.
      is_searched: Whether top-k or top-p is on; False for NaN, which the draw reports.
      top_k: Tokens that suffice; 0 where top-k is off.
      mass: Sum of weights that suffices; infinite where top-p is off.
      max: The largest logit.
      inverse: Of the temperature.
      highest: A bound above the largest logit, as `order_of_float`.
      total: Sum of weights.
      vocab_size: Tokens.
      interpret: Whether the interpreter runs the program.
    """

    index: jax.Array
    is_searched: jax.Array
    top_k: jax.Array
    mass: jax.Array
    max: jax.Array
    inverse: jax.Array
    highest: jax.Array
    total: jax.Array
    vocab_size: int
    interpret: bool

    def is_enough(self, count: jax.Array, mass: jax.Array) -> jax.Array:
        """Whether this many tokens of this mass hold all that the filters keep."""
        return ((self.top_k > 0) & (count >= self.top_k)) | (mass >= self.mass)

    def weights(self, logits: jax.Array) -> jax.Array:
        """Probabilities, but for the norm."""
        return exp_tempered(logits, self.max, self.inverse, interpret=self.interpret)


def all_sum(x: jax.Array) -> jax.Array:
    """The sum over all axes."""
    while x.ndim:
        x = x.sum(axis=x.ndim - 1)
    return x


def num_true(mask: jax.Array) -> jax.Array:
    """How many are True."""
    return all_sum(mask.astype(jnp.int32))


class Blocks(NamedTuple):
    """The blocks of a row, padded to a power of two.

    Attributes:
      row: Its index.
      ids: Index of each.
      tops: Its largest logit; -inf in the padding.
    """

    row: jax.Array
    ids: jax.Array
    tops: jax.Array


def load_blocks(tops_ref, row: jax.Array) -> Blocks:
    """Reads the blocks of a row."""
    num_blocks = tops_ref.shape[1]
    ids = jnp.arange(pl.next_power_of_2(num_blocks))
    tops = pltriton.load(tops_ref.at[row, ids], mask=ids < num_blocks, other=-jnp.inf)
    return Blocks(row, ids, tops)


def total_of(blocks: Blocks, sums_ref, inverse: jax.Array, interpret: bool) -> jax.Array:
    """Sum of exp((logit - the largest) / temperature) of the row."""
    is_block = blocks.ids < sums_ref.shape[1]
    sums = pltriton.load(sums_ref.at[blocks.row, blocks.ids], mask=is_block, other=0.0)
    top = blocks.tops.max(axis=0)
    return (sums * exp_tempered(blocks.tops, top, inverse, interpret=interpret)).sum(axis=0)


def row_of(
    index: jax.Array,
    top: jax.Array,
    total: jax.Array,
    inverse: jax.Array,
    filters: tuple[jax.Array, jax.Array],
    vocab_size: int,
    interpret: bool,
) -> Row:
    """What is known of a row.

    Args:
      index: Of the row.
      top: The largest logit.
      total: Sum of weights.
      inverse: Of the temperature.
      filters: top_k and top_p.
      vocab_size: Tokens.
      interpret: Whether the interpreter runs the program.
    """
    top_k, top_p = filters
    has_k, has_p = (top_k >= 1) & (top_k < vocab_size), top_p < 1
    return Row(
        index=index,
        is_searched=(has_k | has_p) & (total > 0) & (total < jnp.inf),
        top_k=jnp.where(has_k, top_k, 0),
        mass=jnp.where(has_p, top_p * total, jnp.inf),
        max=top,
        inverse=inverse,
        highest=order_of_float(top) + 1,
        total=total,
        vocab_size=vocab_size,
        interpret=interpret,
    )


def guess(
    row: Row, tops: jax.Array, logits_ref, config: TuningConfig
) -> tuple[jax.Array, jax.Array]:
    """Bounds [low, high) of the threshold that are almost surely right, as `order_of_float`."""
    low, is_bounded = _from_blocks(row, tops, config)
    if row.vocab_size <= config.capacity:
        return order_of_float(jnp.where(is_bounded, low, LOWEST)), row.highest
    is_few = num_true(tops >= low) <= int(config.few_blocks * logits_ref.shape[1] / BLOCK)
    low, high = jax.lax.cond(
        (is_bounded & is_few) | ~row.is_searched,
        lambda: (low, row.max),
        lambda: _from_sample(row, logits_ref, config),
    )
    return order_of_float(low), order_of_float(high) + 1


class _Interval(NamedTuple):
    """Where a search goes on: a condition holds at `low`, or nowhere, and not at `high`."""

    low: jax.Array
    high: jax.Array

    def tried(self, shares: jax.Array) -> jax.Array:
        """Thresholds inside, by their shares of the way."""
        return self.low * (1 - shares) + self.high * shares

    def narrowed(self, thresholds: jax.Array, holds: jax.Array) -> "_Interval":
        """The interval after a round of trying."""
        return _Interval(
            jnp.maximum(self.low, jnp.where(holds, thresholds, self.low).max(axis=0)),
            jnp.minimum(self.high, jnp.where(holds, self.high, thresholds).min(axis=0)),
        )


def _above(x: jax.Array, weights: jax.Array, thresholds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many are at or above each threshold, and the weight of those below."""
    # Thresholds along the first axis, which stays inside a thread.
    is_above = x[None, :] >= thresholds[:, None]
    below = jnp.where(is_above, 0.0, weights[None, :]).sum(axis=1)
    return is_above.astype(jnp.int32).sum(axis=1), below


def _from_blocks(row: Row, tops: jax.Array, config: TuningConfig) -> tuple[jax.Array, jax.Array]:
    """A threshold that the block maxima alone are enough for, and whether there is one."""
    weights = row.weights(tops)
    total = weights.sum(axis=0)
    shares = (jnp.arange(_TRIED).astype(jnp.float32) + 1) / (_TRIED + 1)

    def try_some(_: jax.Array, carry: tuple[_Interval, jax.Array]) -> tuple[_Interval, jax.Array]:
        interval, is_bounded = carry
        thresholds = interval.tried(shares)
        count, below = _above(tops, weights, thresholds)
        holds = row.is_enough(count, total - below)
        return interval.narrowed(thresholds, holds), is_bounded + num_true(holds)

    lowest = jnp.where(tops > LOWEST, tops, row.max).min(axis=0)
    num_rounds = row.is_searched.astype(jnp.int32) * config.block_rounds
    start = _Interval(lowest, row.max), jnp.int32(0)
    interval, is_bounded = jax.lax.fori_loop(jnp.int32(0), num_rounds, try_some, start)
    return interval.low, is_bounded > 0


def _from_sample(row: Row, logits_ref, config: TuningConfig) -> tuple[jax.Array, jax.Array]:
    """Bounds from estimates that are `num_errors` standard errors off, either way."""
    index, size = _sample_places(row.vocab_size, config.sample_pieces)
    is_token = index < row.vocab_size
    sample = pltriton.load(logits_ref.at[row.index, index], mask=is_token, other=-jnp.inf)
    weights = row.weights(sample)
    share = row.vocab_size / size
    # Half of the thresholds for either bound, and none twice in the first round.
    place = jnp.arange(_TRIED).astype(jnp.float32)
    is_for_low = place < _TRIED // 2
    to_low, to_high = (place + 1) / (_TRIED // 2 + 1), (place - _TRIED // 2 + 0.5) / (_TRIED // 2)

    def try_some(
        _: jax.Array, carry: tuple[_Interval, _Interval, jax.Array]
    ) -> tuple[_Interval, _Interval, jax.Array]:
        sure, possible, is_bounded = carry
        t = jnp.where(is_for_low, sure.tried(to_low), possible.tried(to_high))
        num_above, below = _above(sample, weights, t)
        count, weight = num_above.astype(jnp.float32), row.weights(t)
        # As if one more token were at the threshold: what was seen never is not impossible.
        count_error = jnp.sqrt(count + 1.0)
        # The squares below add up to no more than their sum by the largest of them.
        mass_error = jnp.sqrt(weight * (below + weight))

        def is_enough(sign: float) -> jax.Array:
            off = sign * config.num_errors
            count_bound = share * (count + off * count_error)
            mass_bound = row.total - share * (below - off * mass_error)
            has_k = (row.top_k > 0) & (count_bound >= row.top_k.astype(jnp.float32))
            is_known = (count >= _FEW) | (sign > 0)
            return is_known & (has_k | (mass_bound >= row.mass))

        is_sure, is_possible = is_enough(-1.0), is_enough(1.0)
        return (
            sure.narrowed(t, is_sure),
            possible.narrowed(t, is_possible),
            is_bounded + num_true(is_sure),
        )

    lowest = jnp.where(sample > -jnp.inf, sample, row.max).min(axis=0)
    start = _Interval(lowest, row.max), _Interval(lowest, row.max), jnp.int32(0)
    sure, possible, is_bounded = jax.lax.fori_loop(0, config.sample_rounds, try_some, start)
    low = jnp.where(is_bounded > 0, sure.low, LOWEST)
    return low, jnp.maximum(low, possible.high)


def _sample_places(vocab_size: int, num_pieces: int) -> tuple[jax.Array, int]:
    """Places of the sample, spread over the row, and how many of them are tokens."""
    num_blocks = -(-vocab_size // BLOCK)

    def places(xp):
        token = xp.arange(num_pieces * _PIECE, dtype=xp.int32)
        piece = token // _PIECE
        block = piece * num_blocks // num_pieces
        return block * BLOCK + piece * 5 % (BLOCK // _PIECE) * _PIECE + token % _PIECE

    return places(jnp), int(np.count_nonzero(places(np) < vocab_size))
