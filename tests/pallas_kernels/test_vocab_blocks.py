"""Reductions over the vocabulary, both ways of computing them, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import vocab_blocks

WIDTH = 1000  # not a multiple of a block


@pytest.fixture(params=[False, True], ids=["passes", "one-pass"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vocab_blocks, "_is_one_pass", lambda: request.param)


def rows() -> np.ndarray:
    x = (5 * np.random.default_rng(0).standard_normal((6, WIDTH))).astype(np.float32)
    x[1] += 3000
    x[2] -= 3000
    x[3, 40:] = -np.inf  # whole blocks
    x[4, 1:] = -np.inf
    return x


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = np.maximum(x.max(axis=-1), vocab_blocks.LOWEST).astype(np.float64)
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(x.astype(np.float64) - top[..., None]).sum(axis=-1))


def test_blocks_hold_maximum_and_sum():
    x = rows()
    sums = vocab_blocks.block_sums(jnp.asarray(x))
    blocks = np.pad(x, ((0, 0), (0, 24)), constant_values=-np.inf).reshape(6, 8, 128)
    np.testing.assert_array_equal(sums.max, np.maximum(blocks.max(-1), vocab_blocks.LOWEST))
    np.testing.assert_allclose(sums.log, log_sum_exp(blocks), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(sums.log_total, log_sum_exp(x), rtol=1e-6, atol=1e-5)


def test_several_arrays_are_reduced_together():
    x = rows()
    got = vocab_blocks.logsumexp(jnp.asarray(x), jnp.asarray(x / 2), jnp.asarray(x[::-1]))
    for one, array in zip(got, (x, x / 2, x[::-1]), strict=True):
        np.testing.assert_allclose(one, log_sum_exp(array), rtol=1e-6, atol=1e-5)


def test_nan_stays_in_its_block():
    x = rows()
    x[0, 200] = np.nan
    sums = vocab_blocks.block_sums(jnp.asarray(x))
    assert np.isnan(sums.max[0, 1]) and np.isnan(sums.log[0, 1])
    assert not np.isnan(np.delete(np.asarray(sums.log), 1, axis=1)).any()
    assert np.isnan(vocab_blocks.logsumexp(jnp.asarray(x))[0]).tolist() == [True] + 5 * [False]
