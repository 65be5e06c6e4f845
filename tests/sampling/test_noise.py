"""The noise of the draw is what it says, for a row, for a token, and between them."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxengine.sampling.context import row_keys
from jaxengine.sampling.noise import gumbel

WIDTH, ROWS = 4096, 64


@pytest.fixture(scope="module")
def uniform() -> np.ndarray:
    """Of one seed at neighbouring positions, then of neighbouring seeds: [2 ROWS, WIDTH]."""
    rows = jnp.arange(ROWS, dtype=jnp.int32)
    keys = [row_keys(0 * rows, 0 * rows + 7, rows), row_keys(0 * rows, rows, 0 * rows)]
    return np.exp(-np.exp(-np.concatenate([gumbel(key, WIDTH) for key in keys], dtype=np.float64)))


def test_every_row_is_gumbel_distributed(uniform: np.ndarray):
    p_values = [stats.kstest(row, "uniform").pvalue for row in uniform]
    assert min(p_values) > 1e-4
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_every_token_is_gumbel_distributed_over_positions_and_seeds(uniform: np.ndarray):
    for half in (uniform[:ROWS], uniform[ROWS:]):
        p_values = stats.kstest(half[:, :500], "uniform", axis=0).pvalue
        assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_neighbours_are_independent(uniform: np.ndarray):
    """Tokens side by side, positions and seeds side by side, and tokens a power of two apart."""
    cells = (16 * uniform).astype(np.int64)
    pairs = {"rows": (cells[:-1], cells[1:])}
    pairs |= {f"tokens {n} apart": (cells[:, :-n], cells[:, n:]) for n in 2 ** np.arange(11)}
    for name, (a, b) in pairs.items():
        counts = np.bincount((16 * a + b).ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4, name


def test_noise_is_finite_and_reaches_far(uniform: np.ndarray):
    noise = -np.log(-np.log(uniform))
    assert np.isfinite(noise).all() and noise.min() < -2.3 and noise.max() > 11
