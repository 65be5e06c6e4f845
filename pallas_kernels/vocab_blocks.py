"""Reductions over a vocabulary in one pass over memory, by blocks of consecutive tokens.

Plain XLA on every device, so that what computes the logits is fused into the pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK = 128
"""Tokens of a block."""

LOWEST = float(np.finfo(np.float32).min)
"""Stands for the maximum of a block that has no tokens left."""


class BlockSums(NamedTuple):
    """What is left of each block.

    Attributes:
      max: The largest logit, at least `LOWEST`; NaN if there is one.
      sum: Of exp(logit - max).
    """

    max: Float[Array, "B blocks"]
    sum: Float[Array, "B blocks"]

    @property
    def log(self) -> Float[Array, "B blocks"]:
        """The logarithm of each block's sum of exp(logit)."""
        return self.max + jnp.log(self.sum)

    @property
    def log_total(self) -> Float[Array, " B"]:
        """The logarithm of each row's sum of exp(logit)."""
        return jax.nn.logsumexp(self.max, b=self.sum, axis=-1)


def in_blocks(x: Float[Array, "B V"]) -> Float[Array, "B blocks width"]:
    """The tokens by blocks; the last one is filled up with -inf."""
    num_rows, width = x.shape
    num_blocks = -(-width // BLOCK)
    if width % BLOCK:
        missing = num_blocks * BLOCK - width
        x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return x.reshape(num_rows, num_blocks, BLOCK)


def block_sums(x: Float[Array, "B V"]) -> BlockSums:
    """Maximum and sum of exponentials of every block, for a stable softmax."""
    top, total = _sums(in_blocks(x), 2)
    # XLA's maximum on a CPU loses NaN; the sum does not.
    return BlockSums(jnp.where(jnp.isnan(total), jnp.nan, top), total)


def logsumexp(*arrays: Float[Array, "*B V"]) -> tuple[Float[Array, "*B"], ...]:
    """log sum exp of every row, of all the arrays in the same pass."""
    return tuple(top + jnp.log(total) for top, total in _row_sums(arrays))


def _sums(x: Array, axis: int) -> tuple[Array, Array]:
    if not _is_one_pass():
        top = jnp.maximum(x.max(axis=axis), LOWEST)
        return top, jnp.exp(x - jnp.expand_dims(top, axis)).sum(axis=axis)
    # In one strand, for XLA fuses it with what else reads the whole array.
    ((top, total),) = _online((x,), axis, num_strands=1)
    return top, total


def _row_sums(arrays: tuple[Array, ...]) -> list[tuple[Array, Array]]:
    if not _is_one_pass():
        return [_sums(x, x.ndim - 1) for x in arrays]
    return _online(arrays, arrays[0].ndim - 1, num_strands=4)


def _is_one_pass() -> bool:
    # A CPU does not vectorise a reduction of several values, and has its caches.
    return jax.default_backend() == "gpu"


def _online(arrays: tuple[Array, ...], axis: int, num_strands: int) -> list[tuple[Array, Array]]:
    """Maxima and sums together, rescaled as the maximum grows.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
    """
    count = len(arrays)

    def merge(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        tops, totals = [], []
        for i in range(count):
            top_a, total_a, top_b, total_b = a[i], a[count + i], b[i], b[count + i]
            # Of the two exponentials one is exp(0). NOTE: `lax`, for `jnp.where` is a call in the
            # reducer, and XLA of jax 0.11.2 dies of such a one whose result nobody reads.
            shrink = jax.lax.exp(-jax.lax.abs(top_a - top_b))
            tops.append(jax.lax.max(top_a, top_b))
            totals.append(
                jax.lax.select(
                    jax.lax.ge(top_a, top_b),
                    total_a + total_b * shrink,
                    total_a * shrink + total_b,
                )
            )
        return (*tops, *totals)

    few = [_few_sums(x, axis, num_strands) for x in arrays]
    tops, totals = tuple(top for top, _ in few), tuple(total for _, total in few)
    start = (jnp.float32(LOWEST),) * count + (jnp.float32(0),) * count
    out = jax.lax.reduce((*tops, *totals), start, merge, (axis,))
    return list(zip(out[:count], out[count:], strict=True))


def _few_sums(x: Array, axis: int, num_strands: int) -> tuple[Array, Array]:
    """Maximum and sum of every few entries, far apart: cheaper than to merge each."""
    strands = jnp.split(x, num_strands if x.shape[axis] % num_strands == 0 else 1, axis=axis)
    # Finite even where all are removed: -inf - -inf is NaN.
    top = functools.reduce(jnp.maximum, strands, jnp.float32(LOWEST))
    return top, functools.reduce(jnp.add, (jnp.exp(strand - top) for strand in strands))
