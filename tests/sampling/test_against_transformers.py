"""Every built-in that transformers has too: the same tokens left, the same scores, drawn as often.

The golden file is made by tests/golden/make_golden.py, with torch.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import jaxengine.sampling as s
from jaxengine.contrib.sampling import top_h
from jaxengine.sampling.builtin.watermark import judged
from tests.sampling.harness import (
    assert_drawn_from,
    context,
    draw_many,
    softmax,
    step,
)

PATH = Path(__file__).parent.parent / "golden" / "sampling.safetensors"
GOLDEN = load_file(PATH)
with safe_open(PATH, "np") as file:
    VALUES = json.loads(file.metadata()["values"])
LOGITS, TEXTS = GOLDEN["logits"], GOLDEN["texts"]

TRANSFORMS = {
    "temperature": s.temperature(),
    "top_k": s.top_k_top_p_min_p(),
    "top_p": s.top_k_top_p_min_p(),
    "min_p": s.top_k_top_p_min_p(),
    "typical": s.typical(),
    "epsilon": s.epsilon(),
    "eta": s.eta(),
    "top_h": top_h(),
    "repetition_penalty": s.repetition_penalty(),
    "no_repeat_ngram": s.no_repeat_ngram(max_window=32),
    "bad_words": s.bad_words(max_words=32, max_length=4),
    "allowed_tokens": s.allowed_tokens(),
}


def requests_of(case: str) -> list[dict[str, Any]]:
    ((name, rows),) = VALUES[case].items()
    return [{name: value} for value in rows]


def counts_of_texts() -> np.ndarray:
    return np.stack([np.bincount(text, minlength=LOGITS.shape[1]) for text in TEXTS])


@pytest.mark.parametrize("case", TRANSFORMS)
def test_scores_and_draws_match_transformers(case: str):
    got = draw_many(
        TRANSFORMS[case], LOGITS, requests_of(case), 1500, texts=TEXTS, counts=counts_of_texts()
    )
    want = GOLDEN[f"scores.{case}"]
    np.testing.assert_array_equal(np.isneginf(got.left), np.isneginf(want))
    np.testing.assert_allclose(got.left, want, rtol=1e-6, atol=1e-6)
    assert_drawn_from(got.tokens, softmax(want))


def test_guidance_matches_transformers():
    requests = requests_of("guidance")
    rows, both = len(requests), np.concatenate([LOGITS, GOLDEN["companion"]])
    group = np.stack([np.tile(np.arange(rows), 2), np.tile(np.arange(rows), 2) + rows], axis=1)
    left = {"left": lambda logits, drawn, ctx: drawn.logits}
    sampler = s.Sampler(s.chain(), combine=s.classifier_free_guidance(), capture=left)
    ctx = context(sampler, requests * 2, LOGITS.shape[1])
    drawn, _ = step(sampler, both, ctx, group=jnp.asarray(group, jnp.int32))
    want = softmax(GOLDEN["scores.guidance"])
    np.testing.assert_allclose(softmax(np.asarray(drawn.leaves["capture/left"]))[:rows], want, 1e-5)
    token = np.asarray(drawn.token)
    np.testing.assert_array_equal(token[:rows], token[rows:], "a companion follows its leader")


def test_watermark_scores_match_transformers():
    for green, scored, z, p in GOLDEN["scores.watermark"].T:
        got = judged(int(green), int(scored), 0.25)
        np.testing.assert_allclose((got.z_score, got.p_value), (z, p), rtol=1e-12)
