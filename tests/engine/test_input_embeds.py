"""Embeddings in place of ids: the same text as the ids they stand for, and others of their own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.errors import RequestError
from tests.engine import tiny

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
PROMPTS = tiny.prompts_of(70, 9, 33, seed=11)
EMBEDS = [tiny.embeddings(tiny.TENSORS, prompt) for prompt in PROMPTS]


def ids(output: Any) -> list[int]:
    return output["output_ids"]


def test_embeddings_of_ids_give_what_the_ids_give(engine: Any):
    outputs = engine.generate(input_embeds=[EMBEDS[0], *EMBEDS[1:]], sampling_params=GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tiny.assert_greedy(prompt, ids(output))
        assert output["meta_info"]["prompt_tokens"] == len(prompt)
    for one in (jnp.asarray(EMBEDS[1]), EMBEDS[1].tolist()):
        assert ids(engine.generate(input_embeds=one, sampling_params=GREEDY)) == ids(outputs[1])


def test_embeddings_of_no_ids(engine: Any):
    """Between two tokens; the first drawn token is the plain forward's."""
    mixed = (EMBEDS[0][:20] + EMBEDS[2][:20]) / 2
    output = engine.generate(input_embeds=mixed, sampling_params=GREEDY, return_hidden_states=True)
    wholes = np.concatenate([mixed, tiny.embeddings(tiny.TENSORS, ids(output))])
    states = tiny.hidden_states(tiny.TENSORS, tiny.CONFIG, wholes)[-1]
    np.testing.assert_allclose(output["meta_info"]["hidden_states"], states, rtol=2e-3, atol=2e-3)
    logits = states @ tiny.TENSORS["lm_head.weight"].T
    assert logits[19:-1].argmax(axis=-1).tolist() == ids(output)


def test_the_cache_stays_on_for_everyone_else(engine: Any):
    """Neither finds the other's prefix: ids stand for nothing there."""
    both = [
        engine.generate(input_ids=PROMPTS[2], sampling_params=GREEDY),
        engine.generate(input_embeds=EMBEDS[2], sampling_params=GREEDY),
        engine.generate(input_embeds=EMBEDS[2][::-1].copy(), sampling_params=GREEDY),
        engine.generate(input_ids=PROMPTS[2], sampling_params=GREEDY),
    ]
    cached = [output["meta_info"]["cached_tokens"] for output in both]
    assert cached[1:] == [0, 0, 32]
    assert ids(both[0]) == ids(both[1]) == ids(both[3]) != ids(both[2])


def test_outputs_survive_preemption(engine: Any):
    """Texts of 129 and 153 tokens in a pool of 240: one is computed anew, its outputs by id."""
    params = {**GREEDY, "max_new_tokens": 120}
    outputs = engine.generate(input_embeds=EMBEDS[1:], sampling_params=params)
    assert sum(o["meta_info"]["num_retractions"] for o in outputs) > 0
    for prompt, output in zip(PROMPTS[1:], outputs, strict=True):
        tiny.assert_greedy(prompt, ids(output))


def test_samples_of_a_prompt_share_its_prefix(engine: Any):
    outputs = engine.generate(input_embeds=EMBEDS[0], sampling_params={**GREEDY, "n": 2})
    assert [o["meta_info"]["cached_tokens"] for o in outputs] == [0, 64]
    assert ids(outputs[0]) == ids(outputs[1])


@pytest.mark.parametrize(
    "call, words",
    [
        ({"input_embeds": np.zeros((3, 31))}, r"array \[tokens, 32\] .* got shape \(3, 31\)"),
        ({"input_embeds": np.zeros((0, 32))}, "at least one token"),
        ({"input_embeds": np.full((2, 32), np.nan)}, "finite"),
        ({"input_embeds": EMBEDS[1], "input_ids": [1]}, "both given; leave all but one out"),
        ({"input_embeds": [EMBEDS[1], [[0.0], [1.0, 2.0]]]}, "`input_embeds` of prompt 1"),
        (
            {"input_embeds": EMBEDS[1], "return_logprob": True, "logprob_start_len": 0},
            "`logprob_start_len`",
        ),
    ],
)
def test_bad_embeddings_are_refused(engine: Any, call: dict[str, Any], words: str):
    with pytest.raises(RequestError, match=words):
        engine.generate(**call)
