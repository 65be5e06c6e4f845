"""One suite for every backend of the filters' threshold."""

import functools
import inspect
import itertools
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Implementation
from pallas_kernels.filter_threshold import api, triton
from pallas_kernels.filter_threshold.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.filter_threshold.collect import Counts
from pallas_kernels.vocab_blocks import block_sums

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

ROUNDING = 1e-5
"""Of a cumulative probability, and of the logit that min-p asks for."""

# Few tokens to a bracket and a small sample, so that no path needs a large vocabulary.
TINY = triton.TuningConfig(tile_blocks=4, num_splits=2, max_found=256, sample_pieces=64)


def spec_named(name: str) -> ArgSpec:
    return next(spec for spec in ARG_SPECS if spec.name == name)


def must_and_may_keep(
    logits: np.ndarray, top_k: int, top_p: float, min_p: float, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """By a sort in float64: what has to be kept, and what rounding may keep beside it."""
    logits = logits.astype(np.float64) / temperature
    order = np.sort(logits)[::-1]
    weights = np.exp(order - order[0])
    cumulative = np.cumsum(weights) / weights.sum()
    by_k = order[top_k - 1] if 1 <= top_k < len(order) else -np.inf
    with np.errstate(divide="ignore"):
        by_min_p = order[0] + np.log(min_p)

    def lowest(rounding: float) -> float:
        crossing = min(np.searchsorted(cumulative, top_p - rounding), len(order) - 1)
        by_p = order[crossing] if top_p < 1 else -np.inf
        return max(by_k, by_p, min(by_min_p + rounding, order[0]))

    is_left = logits > -np.inf  # the others are removed anyhow
    return is_left & (logits >= lowest(ROUNDING)), ~is_left | (logits >= lowest(-ROUNDING))


def assert_right(
    args: tuple[jax.Array, ...], thresholds: jax.Array, temperature: np.ndarray | None = None
):
    temperature = np.ones(len(args[0])) if temperature is None else temperature
    for row, threshold in enumerate(np.asarray(thresholds)):
        logits, *settings = (np.asarray(x)[row] for x in (*args, temperature))
        must, may = must_and_may_keep(logits, *(x.item() for x in settings))
        kept = ~(logits < threshold)
        assert not (must & ~kept).any(), f"row {row}, {settings}: too few"
        assert not (kept & ~may).any(), f"row {row}, {settings}: too many"


def run(spec: ArgSpec, implementation: Implementation, seed: int):
    args = spec.arrays(seed)
    assert_right(args, api.filter_threshold(*args, implementation=implementation))


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


@pytest.mark.parametrize("name", ["corners-60", "corners-5000"])
def test_reference_keeps_what_a_sort_keeps(name: str, seed: int):
    run(spec_named(name), "reference", seed)


def interpreted(args: tuple[jax.Array, ...]) -> jax.Array:
    """Always of the same shapes, so that it is compiled once."""
    return triton.filter_threshold(*args, config=TINY, interpret=True)


def test_interpreted_triton_keeps_what_a_sort_keeps(seed: int):
    args = spec_named("corners-5000").arrays(seed)
    assert_right(args, interpreted(args))


@pytest.mark.parametrize("implementation", ["reference", "triton_interpret"])
def test_filters_judge_what_a_temperature_makes_of_the_logits(
    implementation: Implementation, seed: int
):
    assert_right_with_temperature(implementation, "corners-5000", seed)


def assert_right_with_temperature(implementation: Implementation, name: str, seed: int):
    args = spec_named(name).arrays(seed)
    rng = np.random.default_rng(seed)
    temperature = rng.choice(np.asarray([0.1, 0.7, 1.6, 5.0], np.float32), len(args[0]))
    sums = block_sums(args[0], jnp.asarray(temperature), implementation="reference")
    op = api.filter_threshold
    if implementation == "triton_interpret":
        op = functools.partial(triton.filter_threshold, config=TINY, interpret=True)
    else:
        op = functools.partial(op, implementation=implementation)
    assert_right(args, op(*args, sums=sums), temperature)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["corners-5000", "corners-151936"])
def test_triton_judges_what_a_temperature_makes_of_the_logits(name: str, seed: int):
    assert_right_with_temperature("triton", name, seed)


def test_a_row_does_not_depend_on_the_others(seed: int):
    args = spec_named("corners-5000").arrays(seed)
    order = np.random.default_rng(seed).permutation(len(args[0]))
    moved = interpreted(tuple(x[order] for x in args))
    assert moved.tolist() == interpreted(args)[order].tolist()


@pytest.mark.parametrize("implementation", ["reference", "triton_interpret"])
def test_a_row_of_nan_ends(implementation: Implementation):
    args = spec_named("corners-5000").arrays(0)
    op = interpreted if implementation == "triton_interpret" else reference_of
    got = op((args[0].at[0, 7].set(jnp.nan), *args[1:]))
    assert got[1:].tolist() == op(args)[1:].tolist()


def reference_of(args: tuple[jax.Array, ...]) -> jax.Array:
    return api.filter_threshold(*args, implementation="reference")


def test_a_refuted_guess_costs_passes_and_no_token(seed: int):
    """Bounds that are no errors apart mostly miss; ties overflow what a bracket may hold."""
    config = triton.TuningConfig(
        tile_blocks=4, num_splits=2, max_found=16, sample_pieces=64, few_blocks=0.0, num_errors=0.0
    )
    logits, *settings = spec_named("corners-5000").arrays(seed)
    args = (logits[::5, :2000], *(x[::5] for x in settings))
    assert_right(args, triton.filter_threshold(*args, config=config, interpret=True))


# Settings of top-k, top-p and min-p, of which the last moves no bracket.
MIXED = [*itertools.product([1, -1, 5, 50, 500], [1.0, 0.5, 0.9, 0.95], [0.0, 0.01, 0.1])]


def test_mixed_filters_find_their_tokens_in_one_pass(monkeypatch: pytest.MonkeyPatch):
    """Thresholds are right though a pass of the finishing program would make them wrong.

    Of a large vocabulary, for the smaller it is, the better brackets fit.
    """
    vocab_size = 151_936

    def nothing_found(*args: Any, **how: Any) -> Counts:
        none = jnp.float32(0)
        return Counts(jnp.int32(0), none, jnp.int32(0), none + jnp.inf)

    monkeypatch.setattr(triton, "collect", nothing_found)
    rng = np.random.default_rng(0)
    scales = np.repeat([0.5, 4.0], len(MIXED))[:, None]
    logits = jnp.asarray(scales * rng.standard_normal((len(scales), vocab_size)), jnp.float32)
    top_k, top_p, min_p = (np.asarray(x) for x in zip(*(2 * MIXED), strict=True))
    args = (
        logits,
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(min_p, jnp.float32),
    )
    temperature = np.full(len(scales), 0.8, np.float32)
    sums = block_sums(logits, jnp.asarray(temperature), implementation="reference")
    # What is kept of earlier traces would have the real pass.
    op = inspect.unwrap(triton.filter_threshold)
    run = jax.jit(functools.partial(op, interpret=True))
    assert_right(args, run(*args, sums=sums), temperature)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_triton_keeps_what_a_sort_keeps(spec: ArgSpec, seed: int):
    run(spec, "triton", seed)


@pytest.mark.gpu
def test_triton_gives_the_same_again_and_alone(seed: int):
    args = spec_named("flat-mixed-b256").arrays(seed)
    first, again = (api.filter_threshold(*args, implementation="triton") for _ in range(2))
    alone = api.filter_threshold(*(x[40:44] for x in args), implementation="triton")
    assert first.tolist() == again.tolist()
    assert first[40:44].tolist() == alone.tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=jnp.zeros((2, 8), jnp.bfloat16)), "`logits` must be float32"),
        (dict(top_k=jnp.zeros(2)), "`top_k` must be int32"),
        (dict(top_p=jnp.zeros(3)), r"`top_p` must be float32\(2,\). Got float32\(3,\)"),
        (dict(min_p=jnp.zeros(2, jnp.int32)), "`min_p` must be float32"),
        (dict(implementation="cuda"), "must be one of .* Got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str):
    args = dict(
        logits=jnp.zeros((2, 8)),
        top_k=jnp.zeros(2, jnp.int32),
        top_p=jnp.ones(2),
        min_p=jnp.zeros(2),
    )
    # Without the shape checks that the tests put on every function.
    op = inspect.unwrap(api.filter_threshold)
    with pytest.raises(ValueError, match=message):
        op(**(args | change))


def test_a_vocabulary_too_large_is_refused():
    rows = jax.ShapeDtypeStruct((1,), jnp.float32)
    logits = jax.ShapeDtypeStruct((1, 600_000), jnp.float32)
    with pytest.raises(NotImplementedError, match="600000 tokens are more than 524288"):
        jax.eval_shape(
            triton.filter_threshold, logits, jax.ShapeDtypeStruct((1,), jnp.int32), rows, rows
        )
