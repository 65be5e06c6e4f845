"""Reductions over the vocabulary, every way of computing them, against float64."""

import functools
import inspect
import secrets
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import vocab_blocks
from pallas_kernels.vocab_blocks import BLOCK, LOWEST, WIDE_BLOCK, BlockSums, reference
from pallas_kernels.vocab_blocks.arg_specs import ARG_SPECS, ArgSpec

type Op = Callable[..., BlockSums]

SMALL = [spec for spec in ARG_SPECS if spec.is_small]
(ODD,) = [spec for spec in ARG_SPECS if spec.is_odd]


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


@pytest.fixture(params=[False, True], ids=["passes", "one-pass"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_is_one_pass", lambda: request.param)


@pytest.fixture(params=["passes", "one-pass", "triton_interpret"])
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Op:
    is_kernel = request.param == "triton_interpret"
    monkeypatch.setattr(reference, "_is_one_pass", lambda: request.param == "one-pass")
    implementation = request.param if is_kernel else "reference"
    return functools.partial(vocab_blocks.block_sums, implementation=implementation)


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    top = np.maximum(x.max(axis=-1), LOWEST).astype(np.float64)
    with np.errstate(divide="ignore"):
        return top + np.log(np.exp(x.astype(np.float64) - top[..., None]).sum(axis=-1))


def check(op: Op, spec: ArgSpec, seed: int) -> None:
    x = np.asarray(spec.array(seed))
    sums = op(jnp.asarray(x))
    check_sums(sums, x, BLOCK)
    np.testing.assert_array_equal(sums.argmax(jnp.asarray(x)), x.argmax(axis=-1))


def check_sums(sums: BlockSums, x: np.ndarray, width: int) -> None:
    missing = -x.shape[1] % width
    blocks = np.pad(x, ((0, 0), (0, missing)), constant_values=-np.inf)
    blocks = blocks.reshape(len(x), -1, width)
    np.testing.assert_array_equal(sums.max, np.maximum(blocks.max(-1), LOWEST))
    np.testing.assert_allclose(sums.log, log_sum_exp(blocks), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(sums.log_total, log_sum_exp(x), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_blocks_hold_maximum_and_sum(op: Op, spec: ArgSpec, seed: int):
    check(op, spec, seed)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_wide_blocks_hold_maximum_and_sum(way: None, spec: ArgSpec, seed: int):
    x = np.asarray(spec.array(seed))
    check_sums(vocab_blocks.wide_sums(jnp.asarray(x)), x, WIDE_BLOCK)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_the_kernel_holds_maximum_and_sum(spec: ArgSpec, seed: int):
    check(functools.partial(vocab_blocks.block_sums, implementation="triton"), spec, seed)


def test_nan_stays_in_its_block_and_is_the_largest(op: Op, seed: int):
    x = np.asarray(ODD.array(seed)).copy()
    x[0, 200] = x[0, 201] = x[5, -1] = np.nan
    sums = op(jnp.asarray(x))
    is_nan = np.isnan(np.asarray(sums.log))
    assert np.argwhere(is_nan).tolist() == [[0, 1], [5, is_nan.shape[1] - 1]]
    np.testing.assert_array_equal(np.isnan(sums.max), is_nan)
    np.testing.assert_array_equal(sums.argmax(jnp.asarray(x)), x.argmax(axis=-1))


@pytest.fixture(params=["passes", "triton_interpret"])
def ops(request: pytest.FixtureRequest) -> tuple[Op, Op]:
    """Both ops, one way of computing them."""
    return both_ops("reference" if request.param == "passes" else request.param)


def both_ops(implementation: Any) -> tuple[Op, Op]:
    return (
        functools.partial(vocab_blocks.block_sums, implementation=implementation),
        functools.partial(vocab_blocks.kept_sums, implementation=implementation),
    )


def check_tempered_and_kept(ops: tuple[Op, Op], spec: ArgSpec, seed: int) -> None:
    x = np.asarray(spec.array(seed))
    rng = np.random.default_rng(seed)
    temperature = rng.choice([0.05, 0.7, 1.0, 1.9, 30.0], len(x)).astype(np.float32)
    # Of a token each, but for a row that keeps all and one that keeps its largest alone.
    lowest = x[np.arange(len(x)), rng.integers(0, x.shape[1], len(x))]
    lowest[0], lowest[-1] = x[0].max(), -np.inf
    sums = ops[0](jnp.asarray(x), jnp.asarray(temperature))
    kept = ops[1](jnp.asarray(x), sums, jnp.asarray(lowest))
    left = np.where(x < lowest[:, None], -np.inf, x)
    for got, array in ((sums, x), (kept, left)):
        blocks = np.pad(array, ((0, 0), (0, -x.shape[1] % BLOCK)), constant_values=-np.inf)
        blocks = blocks.reshape(len(x), -1, BLOCK)
        top = np.maximum(blocks.max(axis=-1), LOWEST)
        tempered = blocks.astype(np.float64) / temperature[:, None, None]
        np.testing.assert_array_equal(got.max, top)
        np.testing.assert_allclose(got.log, log_sum_exp(tempered), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_sums_have_a_temperature_and_may_lose_tokens(ops: tuple[Op, Op], spec: ArgSpec, seed: int):
    check_tempered_and_kept(ops, spec, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_the_kernels_have_a_temperature_and_may_lose_tokens(spec: ArgSpec, seed: int):
    check_tempered_and_kept(both_ops("triton"), spec, seed)


def test_what_filters_leave_of_nan_is_nan(ops: tuple[Op, Op], seed: int):
    x = np.asarray(ODD.array(seed)).copy()
    x[0, 200] = np.nan
    for lowest in (-np.inf, 1.0, np.nan):
        at = jnp.full(len(x), lowest, jnp.float32)
        kept = ops[1](jnp.asarray(x), ops[0](jnp.asarray(x)), at)
        assert np.argwhere(np.isnan(np.asarray(kept.log))).tolist() == [[0, 1]]
        assert np.argwhere(np.isnan(np.asarray(kept.max))).tolist() == [[0, 1]]


def test_several_arrays_are_reduced_together(way: None, seed: int):
    x = np.asarray(ODD.array(seed))
    got = vocab_blocks.logsumexp(jnp.asarray(x), jnp.asarray(x / 2), jnp.asarray(x[::-1]))
    for one, array in zip(got, (x, x / 2, x[::-1]), strict=True):
        np.testing.assert_allclose(one, log_sum_exp(array), rtol=1e-6, atol=1e-5)


def test_nan_is_a_rows_sum(way: None, seed: int):
    x = np.asarray(ODD.array(seed)).copy()
    x[0, 200] = np.nan
    assert np.isnan(vocab_blocks.logsumexp(jnp.asarray(x))[0]).tolist() == [True] + 6 * [False]


def test_what_is_no_batch_of_logits_is_refused():
    # Without the shape checks that the tests put on every function.
    op = inspect.unwrap(vocab_blocks.block_sums)
    with pytest.raises(ValueError, match="`x` must be float32"):
        op(jnp.zeros((2, 8), jnp.int32))
