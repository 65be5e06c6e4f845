"""Every built-in at mixed values in one batch of one chain, so that what is off stays out of the
way: the tokens left and their scores are the oracle's, and they are drawn as often as they say.

The oracle of the oracle is transformers, by the golden file of tests/golden/make_golden.py.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import jaxengine.sampling as s
from jaxengine.contrib.sampling import p_less, top_h
from jaxengine.sampling.builtin.watermark import judged
from tests.sampling import oracle
from tests.sampling.harness import Draws, assert_drawn_from, context, draw_many, step
from tests.sampling.oracle import softmax

PATH = Path(__file__).parent.parent / "golden" / "sampling.safetensors"
GOLDEN = load_file(PATH)
with safe_open(PATH, "np") as file:
    OF_TRANSFORMERS = json.loads(file.metadata()["values"])
GUIDANCE = OF_TRANSFORMERS.pop("guidance")
LOGITS, TEXTS = GOLDEN["logits"], GOLDEN["texts"]
ROWS, V = LOGITS.shape

# As in the golden file: a value for each row, by the name of the sampling parameter.
OTHERS: dict[str, dict[str, list[Any]]] = {
    "dynamic_temperature": {
        "temperature": [0.5, 1.0, 1.0, 1.5, 0.2, 1.0],
        "dynatemp_range": [0.3, 0.5, 1.0, 0.7, 0.5, 3.0],
        "dynatemp_exponent": [1.0, 1.0, 0.5, 2.0, 1.0, 1.5],
    },
    "top_n_sigma": {"top_n_sigma": [0.1, 0.5, 1.0, 1.5, 3.0, 10.0]},
    "p_less": {"p_less": [1] * 6},
    "mirostat_v2": {"mirostat_tau": [0.2, 1.0, 2.0, 3.0, 4.0, 8.0]},
    "additive_penalties": {
        "frequency_penalty": [0.0, 0.5, 2.0, -1.0, 0.1, 0.3],
        "presence_penalty": [1.0, 0.0, -2.0, 1.5, 2.0, 0.7],
    },
    "logit_bias": {
        "logit_bias_ids": [[], [3], [0, 47], [5, 6, 7], list(range(24)), [1]],
        "logit_bias_values": [[], [2.0], [-3.0, 1.5], [0.5, -100.0, 4.0], [0.7] * 24, [-0.1]],
    },
    "dry": {
        "dry_multiplier": [0.8, 0.3, 1.0, 0.5, 2.0, 0.8],
        "dry_base": [1.75, 1.0, 2.0, 1.2, 1.75, 1.75],
        "dry_allowed_length": [1, 1, 2, 3, 1, 2],
        "dry_penalty_last_n": [-1, 10, -1, -1, 24, 5],
        "dry_sequence_breakers": [[], [], [4], [], [0, 1], []],
    },
    "forced_tokens": {"forced_token_ids": [[3], [0, 5], [47], [9, 9], [1], [2, 3, 4]]},
    "watermark": {"watermark_delta": [0.5, 1.0, 2.0, 3.0, 5.0, 10.0]},
}
VALUES = {**OF_TRANSFORMERS, **OTHERS}

EVERYTHING = s.chain(
    s.additive_penalties(),
    s.min_new_tokens(),
    s.repetition_penalty(),
    s.logit_bias(),
    s.dry(max_window=32),
    s.no_repeat_ngram(max_window=32),
    s.bad_words(max_words=32, max_length=4),
    s.allowed_tokens(),
    s.thinking_budget(40, 41, 42),
    s.watermark(),
    s.dynamic_temperature(),
    s.top_k_top_p_min_p(),
    s.typical(),
    s.eta(),
    s.epsilon(),
    s.top_n_sigma(),
    p_less(),
    top_h(),
    s.xtc(),
    s.mirostat_v2(),
    s.forced_tokens(),
)
NUM_DRAWS = 500


def requests_of(case: str) -> list[dict[str, Any]]:
    values = VALUES[case]
    return [{name: rows[i] for name, rows in values.items()} for i in range(ROWS)]


def expected(case: str, logits: np.ndarray) -> np.ndarray:
    rows = zip(logits, TEXTS, requests_of(case), strict=True)
    return np.stack([getattr(oracle, case)(row, text, **values) for row, text, values in rows])


@pytest.mark.parametrize("case", VALUES)
def test_scores_and_draws_are_as_defined(case: str, drawn: dict[str, Draws]):
    got, want = drawn[case], expected(case, LOGITS)
    np.testing.assert_array_equal(np.isneginf(got.left), np.isneginf(want))
    np.testing.assert_allclose(got.left, want, rtol=1e-5, atol=1e-5)
    assert_drawn_from(got.tokens, softmax(want))


@pytest.mark.parametrize("case", OF_TRANSFORMERS)
def test_oracle_is_as_transformers(case: str):
    want = GOLDEN[f"scores.{case}"]
    np.testing.assert_allclose(expected(case, LOGITS), want, rtol=1e-6, atol=1e-6)


class Row(NamedTuple):
    logits: list[float]
    request: dict[str, Any]
    left: list[float]


X = -np.inf
TEXT_BY_HAND = [0, 1, 2, 0, 1]
# Worked by hand. Probabilities 1/2, 1/4, 1/8, 1/8 unless said otherwise, so entropy 1.75 bits.
HALVES = [float(np.log(p)) for p in (0.5, 0.25, 0.125, 0.125)]
A, B, C, D = HALVES
BY_HAND = {
    # |surprise - 1.75| in bits: 0.75, 0.25, 1.25, 1.25.
    "typical_keeps_the_nearest": Row(HALVES, {"typical_p": 0.2}, [X, B, X, X]),
    "typical_keeps_what_crosses": Row(HALVES, {"typical_p": 0.3}, [A, B, X, X]),
    "typical_keeps_equals": Row(HALVES, {"typical_p": 0.8}, HALVES),
    "epsilon": Row(HALVES, {"epsilon_cutoff": 0.2}, [A, B, X, X]),
    "epsilon_keeps_the_top": Row(HALVES, {"epsilon_cutoff": 0.9}, [A, X, X, X]),
    # exp(-H) = 2^-1.75 = 0.297: eta = min(e, 0.297 sqrt e).
    "eta_of_0.16": Row(HALVES, {"eta_cutoff": 0.16}, HALVES),  # 0.119
    "eta_of_0.2": Row(HALVES, {"eta_cutoff": 0.2}, [A, B, X, X]),  # 0.133
    # Logits 3 1 1 1 2: mean 1.6, deviation 0.8.
    "top_n_sigma": Row([3, 1, 1, 1, 2], {"top_n_sigma": 1.3}, [3, X, X, X, 2]),
    # 1/4 + 1/16 + 2/64 = 0.34.
    "p_less": Row(HALVES, {"p_less": 1}, [A, X, X, X]),
    # Surprise 1, 2, 3, 3 bits, at most mu = 2 tau.
    "mirostat": Row(HALVES, {"mirostat_tau": 1.1}, [A, B, X, X]),
    "mirostat_keeps_the_top": Row(HALVES, {"mirostat_tau": 0.1}, [A, X, X, X]),
    "xtc_keeps_the_least_viable": Row(
        HALVES, {"xtc_probability": 1.0, "xtc_threshold": 0.2}, [X, B, C, D]
    ),
    "xtc_of_one_viable_is_nothing": Row(
        HALVES, {"xtc_probability": 1.0, "xtc_threshold": 0.4}, HALVES
    ),
    # 1.75 of 2 bits: T = 0.5 + 1 * 7/8.
    "dynamic_temperature": Row(
        HALVES,
        {"temperature": 1.0, "dynatemp_range": 0.5},
        [x / 1.375 for x in HALVES],
    ),
    # Entropy 1 of at most 1 bit, removed tokens left out: T = 1.5.
    "dynamic_temperature_of_two": Row(
        [3.0, 3.0, X, X], {"temperature": 1.0, "dynatemp_range": 0.5}, [2.0, 2.0, X, X]
    ),
    # 2 would repeat three tokens, 0.8 * 1.75^(2-1).
    "dry": Row(HALVES, {"dry_multiplier": 0.8, "dry_allowed_length": 1}, [A, B, C - 1.4, D]),
    "dry_not_past_a_breaker": Row(
        HALVES,
        {"dry_multiplier": 0.8, "dry_allowed_length": 1, "dry_sequence_breakers": [0]},
        [A, B, C - 0.8, D],
    ),
    "ngram": Row(HALVES, {"no_repeat_ngram_size": 3}, [A, B, X, D]),
    "bad_words": Row(HALVES, {"bad_words": [[0, 1, 3], [1, 1, 2], [0]]}, [X, B, C, X]),
    "allowed": Row(HALVES, {"allowed_token_ids": [2, 1]}, [X, B, C, X]),
    "forced": Row(HALVES, {"forced_token_ids": [3, 1]}, [X, X, X, 0.0]),
    "nothing": Row(HALVES, {}, HALVES),
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, Draws]:
    """What one step of the whole chain draws for every case, a case's rows together."""
    by_hand = np.full((len(BY_HAND), V), -np.inf, np.float32)
    for padded, row in zip(by_hand, BY_HAND.values(), strict=True):
        padded[: len(row.logits)] = row.logits
    texts = [*np.tile(TEXTS, (len(VALUES), 1)), *[TEXT_BY_HAND] * len(BY_HAND)]
    got = draw_many(
        EVERYTHING,
        np.concatenate([np.tile(LOGITS, (len(VALUES), 1)), by_hand]),
        [request for case in VALUES for request in requests_of(case)]
        + [row.request for row in BY_HAND.values()],
        NUM_DRAWS,
        texts=texts,
        counts=np.stack([np.bincount(text, minlength=V) for text in texts]),
    )
    first = len(VALUES) * ROWS
    rows = [slice(i, i + ROWS) for i in range(0, first, ROWS)]
    rows += [slice(i, i + 1) for i in range(first, first + len(BY_HAND))]
    return {
        name: Draws(*(x[row] for x in got))
        for name, row in zip([*VALUES, *(f"{case} by hand" for case in BY_HAND)], rows, strict=True)
    }


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case: str, drawn: dict[str, Draws]):
    want = BY_HAND[case].left
    got = drawn[f"{case} by hand"].left[0, : len(want)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_xtc_draws_from_both_distributions():
    sampler = s.Sampler(s.xtc())
    probability, threshold = [0.0, 0.1, 0.5, 0.5, 0.9, 1.0], [0.1, 0.05, 0.05, 0.6, 0.02, 0.1]
    requests = [
        {"xtc_probability": p, "xtc_threshold": t}
        for p, t in zip(probability, threshold, strict=True)
    ]
    got = draw_many(sampler, LOGITS, requests, NUM_DRAWS, is_random=True)
    want = [
        p * softmax(oracle.xtc_hit(row, t)) + (1 - p) * softmax(row)
        for p, t, row in zip(probability, threshold, LOGITS, strict=True)
    ]
    assert_drawn_from(got.tokens, np.stack(want))


CONTRAST = {
    "contrastive_beta": [0.0, 0.5, 0.5, 1.0, 2.0, 0.1],
    "contrastive_alpha": [0.1, 0.1, 0.0, 0.5, 0.2, 1.0],
}


def test_guidance_matches_transformers():
    left, tokens = draw_pairs(s.classifier_free_guidance(), GUIDANCE)
    want = softmax(GOLDEN["scores.guidance"])
    np.testing.assert_allclose(softmax(left), want, rtol=1e-4, atol=1e-7)
    assert_drawn_from(tokens, want)


def test_contrastive_is_as_defined():
    left, tokens = draw_pairs(s.contrastive(), CONTRAST)
    pairs = zip(LOGITS, GOLDEN["companion"], *CONTRAST.values(), strict=True)
    want = np.stack([oracle.contrastive(*pair) for pair in pairs])
    np.testing.assert_allclose(left, want, rtol=1e-5, atol=1e-5)
    assert_drawn_from(tokens, softmax(want))


def draw_pairs(combine: s.Combine, values: dict[str, list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Logits left to the leaders, [rows, V], and their tokens, [rows, draws]."""
    sampler = s.Sampler(
        s.chain(), combine=combine, capture={"left": lambda logits, drawn, ctx: drawn.logits}
    )
    count = ROWS * NUM_DRAWS
    requests = [{name: rows[i] for name, rows in values.items()} for i in range(ROWS)]
    requests = [request for request in requests for _ in range(NUM_DRAWS)] * 2
    leader = jnp.arange(count, dtype=jnp.int32)
    group = jnp.tile(jnp.stack([leader, leader + count], axis=1), (2, 1))
    both = np.repeat(np.concatenate([LOGITS, GOLDEN["companion"]]), NUM_DRAWS, axis=0)
    drawn, _ = step(sampler, both, context(sampler, requests, V), group=group)
    tokens = np.asarray(drawn.token)
    np.testing.assert_array_equal(tokens[:count], tokens[count:], "a companion follows its leader")
    left = np.asarray(drawn.leaves["capture/left"])[:count].reshape(ROWS, NUM_DRAWS, V)
    return left[:, 0], tokens[:count].reshape(ROWS, NUM_DRAWS)


def test_no_stop_token_is_drawn_before_the_fewest_tokens():
    fewest = np.array([0, 1, 3, 4, 8, 2], np.int32)
    stops = np.array([[3, -1], [3, 9], [-1, -1], [0, 47], [47, -1], [5, 6]], np.int32)
    got = draw_many(
        s.min_new_tokens(),
        LOGITS,
        [{}] * ROWS,
        NUM_DRAWS,
        num_generated=2,
        min_new_tokens=jnp.asarray(fewest),
        stop_token_ids=jnp.asarray(stops),
    )
    is_stop = (np.arange(V) == stops[:, :, None]).any(axis=1)
    want = np.where(is_stop & (fewest > 2)[:, None], -np.inf, LOGITS)
    np.testing.assert_array_equal(got.left, want)
    assert_drawn_from(got.tokens, softmax(want))


def test_watermark_test_is_that_of_transformers():
    for green, scored, z, p in GOLDEN["scores.watermark"].T:
        got = judged(int(green), int(scored), 0.25)
        np.testing.assert_allclose((got.z_score, got.p_value), (z, p), rtol=1e-12)
