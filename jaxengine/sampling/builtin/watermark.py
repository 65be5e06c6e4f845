"""A watermark that a statistical test can find, and the test."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.sampling.builtin.common import number_in
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import Logits, LogitsTransform, State, when
from jaxengine.types import Param

_KEY = 15485863  # the millionth prime, as in the authors' code

type _Uint32 = np.ndarray | jax.Array


def watermark(gamma: float = 0.25, key: int = _KEY) -> LogitsTransform:
    """Adds `watermark_delta` to the logits of green tokens, a share gamma of all; 0 is off.

    Which tokens are green is a secret function of the token before. Each is green by itself with
    probability gamma, by a hash, where the paper cuts a permutation of the vocabulary: that would
    be a sort for every row. The detector's test is the same.

    Args:
      gamma: Share of green tokens, in (0, 1).
      key: The secret, in [0, 2**32).

    Source: Kirchenbauer et al., A Watermark for Large Language Models, arXiv:2301.10226,
    algorithm 2.
    """
    _check(gamma, key)

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        before = ctx.last_token[:, None].astype(jnp.uint32)
        tokens = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
        is_green = _is_green(before, tokens, gamma, key)
        return logits + jnp.where(is_green, ctx.watermark_delta[:, None], 0.0)

    check = number_in(0.0, 100.0, "must be a number in [0, 100]")
    params = {"watermark_delta": Param("float32", 0.0, check)}
    return when(lambda ctx: ctx.watermark_delta > 0, LogitsTransform(apply, params=params))


class Detection(NamedTuple):
    """How green a text is.

    Attributes:
      num_scored: Tokens that were judged.
      num_green: Green ones among them.
      z_score: How many standard deviations that is above the expectation without a watermark.
      p_value: Probability of so many or more without one.
    """

    num_scored: int
    num_green: int
    z_score: float
    p_value: float


def detect_watermark(
    token_ids: Sequence[int] | np.ndarray,
    gamma: float = 0.25,
    key: int = _KEY,
    ignore_repeated: bool = True,
) -> Detection:
    """Tests for the watermark of `watermark(gamma, key)`; every token but the first is judged.

    Args:
      token_ids: The text, without its prompt; at least two tokens.
      gamma: As it was written with.
      key: As it was written with.
      ignore_repeated: Count a pair of tokens once, however often it occurs: its repetitions are
        no further evidence, and the p-value holds only without them.

    Raises:
      ValueError: For fewer than two tokens.

    Source: Kirchenbauer et al., arXiv:2301.10226, equation 2.
    """
    _check(gamma, key)
    ids = np.asarray(token_ids, np.uint32)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"`token_ids` must be a list of two tokens or more, got {token_ids!r}.")
    pairs = np.stack([ids[:-1], ids[1:]], axis=1)
    pairs = np.unique(pairs, axis=0) if ignore_repeated else pairs
    num_green = int(np.sum(_is_green(pairs[:, 0], pairs[:, 1], gamma, key)))
    return judged(num_green, len(pairs), gamma)


def judged(num_green: int, num_scored: int, gamma: float) -> Detection:
    """The one-sided z-test of a count of green tokens."""
    spread = math.sqrt(num_scored * gamma * (1 - gamma))
    z_score = (num_green - gamma * num_scored) / spread
    return Detection(num_scored, num_green, z_score, math.erfc(z_score / math.sqrt(2)) / 2)


def _check(gamma: float, key: int) -> None:
    if not 0 < gamma < 1:
        raise ValueError(f"`gamma` must be in (0, 1), got {gamma!r}.")
    if not 0 <= key < 2**32:
        raise ValueError(f"`key` must be in [0, 2**32), got {key!r}.")


def _is_green(before: _Uint32, token: _Uint32, gamma: float, key: int) -> _Uint32:
    """The same numbers on the device, where it is written, and on the host, where it is read."""
    return _mixed(_mixed(before ^ np.uint32(key)) ^ token) < np.uint32(gamma * 2**32)


def _mixed(x: _Uint32) -> _Uint32:
    """Any 32 bits to 32 bits that look random, one to one.

    Source: C. Wellons, hash-prospector, `lowbias32`.
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
