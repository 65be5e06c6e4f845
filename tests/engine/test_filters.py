"""The sampler alone, on logits of its own: which tokens may be drawn, and how often they are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from jaxengine.sampling import default_sampler, top_k_top_p_min_p
from jaxengine.sampling.context import SamplingContext, row_keys
from jaxengine.sampling.logprobs import Wants
from jaxengine.sampling.sampler import NAN_TOKEN, init_state, sample

SAMPLER = default_sampler()


def make_context(num_rows: int, vocab: int, **values: Any) -> SamplingContext:
    """Rows with these per-request values, a scalar standing for all rows; seeds are 0, 1, 2..."""
    given = {name: np.asarray(value) for name, value in values.items()}
    filled = {}
    for name, param in SAMPLER.params.items():
        default = np.full(param.shape, param.pad) if param.shape else param.default
        value = jnp.asarray(given.get(name, default), param.dtype)
        filled[name] = jnp.broadcast_to(value, (num_rows, *param.shape))
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    zeros = jnp.zeros_like(rows)
    return SamplingContext(
        values=filled,
        key=row_keys(zeros, rows, zeros),
        position=zeros,
        num_generated=zeros,
        min_new_tokens=zeros,
        last_token=zeros,
        prompt_len=zeros + 1,
        active=rows >= 0,
        stop_token_ids=jnp.full((num_rows, 1), -1, jnp.int32),
        slots=zeros,
        slot_counts=jnp.zeros((1, vocab), jnp.int16),
    )


@jax.jit
def draw(logits: jax.Array, ctx: SamplingContext) -> tuple[jax.Array, jax.Array]:
    wants = Wants(ctx.active, ~ctx.active, ctx.stop_token_ids, 1)
    drawn, _ = sample(SAMPLER, logits, init_state(SAMPLER, ctx), ctx, wants)
    return drawn.token, drawn.leaves["logprob"]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float64)
    return weights / weights.sum(axis=-1, keepdims=True)


def allowed(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """bool[V]: what passes all three filters, each on the whole distribution."""
    probs = softmax(logits)
    order = np.argsort(-probs, kind="stable")
    ranks = np.empty(len(probs), int)
    ranks[order] = np.arange(len(probs))
    before = np.cumsum(probs[order])[ranks] - probs  # the crossing token is kept
    return (
        ((ranks < top_k) if top_k > 0 else True) & (before < top_p) & (probs >= min_p * probs.max())
    )


def test_filters_keep_what_a_sort_would_keep():
    rng = np.random.default_rng(0)
    num_rows, vocab = 300, 50
    logits = (3 * rng.standard_normal((num_rows, vocab))).astype(np.float32)
    top_k = rng.choice([-1, 1, 2, 5, 49, 50, 51, 10**6], num_rows)
    top_p = np.where(rng.random(num_rows) < 0.3, 1.0, rng.random(num_rows)).astype(np.float32)
    min_p = np.where(rng.random(num_rows) < 0.5, 0.0, rng.random(num_rows)).astype(np.float32)
    ctx = make_context(num_rows, vocab, top_k=top_k, top_p=top_p, min_p=min_p)
    filtered = np.asarray(top_k_top_p_min_p().apply(jnp.asarray(logits), (), ctx))
    kept = np.isfinite(filtered)
    expected = np.stack([allowed(*row) for row in zip(logits, top_k, top_p, min_p, strict=True)])
    np.testing.assert_array_equal(kept, expected)
    np.testing.assert_array_equal(filtered[kept], logits[kept])
    assert kept.any(axis=-1).all()


def test_filters_keep_tokens_equal_to_the_threshold_and_survive_infinities():
    gone = -np.inf
    rows = [[2, 2, 2, 1, gone, gone], [5, gone, gone, gone, 5, 0]]
    logits = np.asarray(rows, np.float32)
    for values, expected in (
        ({"top_k": 1}, [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0]]),
        ({"top_k": 4}, [[1, 1, 1, 1, 0, 0], None]),
        ({"top_p": 0.01}, [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0]]),
        ({"min_p": 1.0}, [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0]]),
    ):
        ctx = make_context(2, 6, **values)
        filtered = np.asarray(top_k_top_p_min_p().apply(jnp.asarray(logits), (), ctx))
        assert not np.isnan(filtered).any()
        for row, mask in zip(filtered, expected, strict=True):
            if mask is not None:
                assert np.isfinite(row).tolist() == [bool(bit) for bit in mask]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=lambda values: "+".join(values) or "plain",
)
def test_draws_follow_the_distribution(values: dict[str, Any]):
    num_draws, vocab = 20_000, 12
    logits = np.random.default_rng(1).standard_normal(vocab).astype(np.float32) * 1.5
    ctx = make_context(num_draws, vocab, **values)
    tokens, logprobs = draw(jnp.broadcast_to(logits, (num_draws, vocab)), ctx)
    scaled = logits / values.get("temperature", 1.0)
    keep = allowed(scaled, *(values.get(k, d) for k, d in FILTER_DEFAULTS.items()))
    probs = np.where(keep, softmax(scaled), 0)
    probs /= probs.sum()
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    assert counts[~keep].sum() == 0
    assert chisquare(counts[keep], num_draws * probs[keep]).pvalue > 1e-3
    # SGLang's logprobs are those before the filters.
    expected = np.log(softmax(scaled))[np.asarray(tokens)]
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)


FILTER_DEFAULTS = {"top_k": -1, "top_p": 1.0, "min_p": 0.0}


def test_rows_with_other_settings_do_not_change_a_row():
    """Every path through the sampler gives a row the same token."""
    num_rows, vocab = 64, 40
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((num_rows, vocab)), jnp.float32)
    plain, _ = draw(logits, make_context(num_rows, vocab))
    top_k, temperature = np.full(num_rows, -1), np.ones(num_rows)
    top_k[::3], temperature[1::3] = 4, 0.0
    mixed, _ = draw(logits, make_context(num_rows, vocab, top_k=top_k, temperature=temperature))
    assert plain[2::3].tolist() == mixed[2::3].tolist()
    assert mixed[1::3].tolist() == logits[1::3].argmax(axis=-1).tolist()
    greedy, _ = draw(logits, make_context(num_rows, vocab, temperature=0.0))
    assert greedy.tolist() == logits.argmax(axis=-1).tolist()


@pytest.mark.parametrize("values", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_anywhere_in_a_row_is_reported_for_that_row_alone(values: dict[str, Any], sign: float):
    logits = np.random.default_rng(3).standard_normal((4, 20)).astype(np.float32)
    clean, _ = draw(jnp.asarray(logits), make_context(4, 20, **values))
    logits[1, 7] = np.copysign(np.float32(np.nan), sign)
    logits[2] = np.copysign(np.float32(np.nan), sign)
    tokens, _ = draw(jnp.asarray(logits), make_context(4, 20, **values))
    assert tokens.tolist() == [int(clean[0]), NAN_TOKEN, NAN_TOKEN, int(clean[3])]
