"""Reductions over a vocabulary by XLA: one pass over memory on a GPU, plain sums elsewhere.

What computes the logits is fused into the pass.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.vocab_blocks.blocks import LOWEST, WIDE_BLOCK, BlockSums, in_blocks


def block_sums(x: Float[Array, "B V"], temperature: Float[Array, " B"] | None = None) -> BlockSums:
    """Maximum and sum of exponentials of every block; see `api.block_sums`."""
    blocks = in_blocks(x)
    if temperature is None:
        return _named(*_sums(blocks, 2))
    top = jnp.maximum(blocks.max(axis=2), LOWEST)
    tempered = (blocks - top[:, :, None]) / temperature[:, None, None]
    return _named(top, jnp.exp(tempered).sum(axis=2), temperature)


def wide_sums(x: Float[Array, "B V"]) -> BlockSums:
    """Maximum and sum of exponentials of every `WIDE_BLOCK` tokens, for what XLA computes."""
    return _named(*_sums(in_blocks(x, WIDE_BLOCK), 2))


def _named(top: Array, total: Array, temperature: Array | None = None) -> BlockSums:
    # XLA's maximum on a CPU loses NaN; the sum does not.
    return BlockSums(jnp.where(jnp.isnan(total), jnp.nan, top), total, temperature)


def kept_sums(x: Float[Array, "B V"], sums: BlockSums, lowest: Float[Array, " B"]) -> BlockSums:
    """Maximum and sum of what is left from `lowest` up; see `api.kept_sums`."""
    return block_sums(jnp.where(x < lowest[:, None], -jnp.inf, x), sums.temperature)


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
    if not arrays or not _is_one_pass():
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
    # What is removed counts where nothing is left; NaN stays.
    sums = (
        jnp.where(top == LOWEST, 0 * total, total)
        for top, total in zip(out[:count], out[count:], strict=True)
    )
    return list(zip(out[:count], sums, strict=True))


def _few_sums(x: Array, axis: int, num_strands: int) -> tuple[Array, Array]:
    """Maximum and sum of every few entries, far apart: cheaper than to merge each."""
    if num_strands == 1 or x.shape[axis] % num_strands:
        # Not by exponentials: the fewer uses of an entry, the more readily XLA fuses what computes
        # it. A user's mirostat had two arrays of the logits' size written for the draw.
        return jnp.maximum(x, LOWEST), jnp.ones_like(x)
    strands = jnp.split(x, num_strands, axis=axis)
    # Finite even where all are removed: -inf - -inf is NaN.
    top = functools.reduce(jnp.maximum, strands, jnp.float32(LOWEST))
    return top, functools.reduce(jnp.add, (jnp.exp(strand - top) for strand in strands))
