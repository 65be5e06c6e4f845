"""What test_builtins.py shows at 48 tokens, at the vocabulary of a real model; takes minutes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxengine.sampling as s
from jaxengine.contrib.sampling import p_less, top_h
from jaxengine.sampling.context import row_keys
from jaxengine.sampling.sampler import init_state, sample
from tests.sampling import oracle
from tests.sampling.harness import assert_drawn_from, context, no_wants
from tests.sampling.oracle import softmax
from tests.sampling.test_builtins import LOGITS, ROWS, TEXTS, VALUES, expected, requests_of

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

V = 151_936
NUM_DRAWS, DRAWS_AT_ONCE = 240, 20
"""Draws of a row, and how many of them one step makes: logits take 0.6 MB a row."""


def large_logits() -> np.ndarray:
    """The small ones, as many others anywhere, and a long flat tail of a fifth of the mass."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-8, 1, (ROWS, V))
    small = LOGITS.shape[1]
    logits[:, :small] = LOGITS
    for row in logits:
        row[rng.choice(np.arange(small, V), small, replace=False)] = rng.normal(0, 2, small)
    return logits.astype(np.float32)


BIG = large_logits()


TRANSFORMS = {
    **dict.fromkeys(["top_k", "top_p", "min_p"], s.top_k_top_p_min_p),
    "dry": lambda: s.dry(max_window=32),
    "no_repeat_ngram": lambda: s.no_repeat_ngram(max_window=32),
    "bad_words": lambda: s.bad_words(max_words=32, max_length=4),
    "p_less": p_less,
    "top_h": top_h,
}
"""By case; elsewhere the built-in of its name."""


def draw_many(transform: s.LogitsTransform, requests: list[dict[str, Any]]) -> np.ndarray:
    """Tokens [rows, draws], every draw with a seed of its own."""
    sampler = s.as_sampler(transform)
    counts = np.stack([np.bincount(text, minlength=V) for text in TEXTS])
    ctx = context(sampler, requests, V, texts=TEXTS.tolist(), counts=counts)
    shared = {"arrays": ctx.arrays, "slot_counts": ctx.slot_counts}
    each = dataclasses.replace(ctx, arrays=(), slot_counts=jnp.zeros((ROWS, 0), jnp.int16))
    each = jax.tree.map(lambda x: jnp.repeat(x, DRAWS_AT_ONCE, axis=0), each)
    rows = ROWS * DRAWS_AT_ONCE
    logits = jnp.repeat(jnp.asarray(BIG), DRAWS_AT_ONCE, axis=0)

    # The run compiles quickly rather than well; here it is the other way round.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def step(logits: Any, ctx: s.SamplingContext) -> Any:
        state = init_state(sampler, ctx)
        return sample(sampler, logits, state, ctx, no_wants(rows))[0].token

    tokens = []
    for i in range(NUM_DRAWS // DRAWS_AT_ONCE):
        seeds = jnp.arange(i * rows, (i + 1) * rows)
        keys = row_keys(0 * seeds, seeds, each.position)
        drawn = step(logits, dataclasses.replace(each, key=keys, **shared))
        tokens.append(np.asarray(drawn).reshape(ROWS, DRAWS_AT_ONCE))
    return np.concatenate(tokens, axis=1)


@pytest.mark.parametrize("case", VALUES)
def test_draws_are_as_defined(case: str):
    transform = TRANSFORMS.get(case) or getattr(s, case)
    tokens = draw_many(transform(), requests_of(case))
    assert_drawn_from(tokens, softmax(expected(case, BIG)))


def test_xtc_draws_from_both_distributions():
    probability, threshold = [0.0, 0.1, 0.5, 0.5, 0.9, 1.0], [0.1, 0.05, 0.05, 0.6, 0.02, 0.1]
    values = list(zip(probability, threshold, strict=True))
    got = draw_many(s.xtc(), [{"xtc_probability": p, "xtc_threshold": t} for p, t in values])
    want = [
        p * softmax(oracle.xtc_hit(row, t)) + (1 - p) * softmax(row)
        for (p, t), row in zip(values, BIG, strict=True)
    ]
    assert_drawn_from(got, np.stack(want))
