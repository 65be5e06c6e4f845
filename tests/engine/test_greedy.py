"""Greedy tokens are those of a plain forward, however they were batched, paged and windowed."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxengine
from jaxengine.build import read_model_config
from tests.engine import tiny

GREEDY = {"temperature": 0, "ignore_eos": True}
LENGTHS = (1, 2, 15, 16, 17, 31, 40, 63, 64, 65, 130)


def generate(engine: Any, prompts: Any, params: Any, **kwargs: Any) -> list[list[int]]:
    outputs = engine.generate(input_ids=prompts, sampling_params=params, **kwargs)
    return [output["output_ids"] for output in outputs]


def test_more_requests_than_slots_and_pages_match_a_plain_forward(engine: Any):
    prompts = tiny.prompts_of(*LENGTHS)
    counts = [min(100, 7 * i + 20) for i in range(len(prompts))]
    params = [{**GREEDY, "max_new_tokens": count} for count in counts]
    most_at_once = max(len(p) + c for p, c in zip(prompts, counts, strict=True))
    assert len(prompts) > engine.config.max_running_requests
    assert sum(counts) > 2 * engine.config.max_total_tokens > most_at_once
    outputs = engine.generate(input_ids=prompts, sampling_params=params)
    assert sum(output["meta_info"]["num_retractions"] for output in outputs) > 0
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output["meta_info"]["finish_reason"] == {"type": "length", "length": count}
        tiny.assert_greedy(prompt, output["output_ids"])


def test_windows_of_any_length_give_the_same(engine: Any, step_engine: Any):
    prompts = tiny.prompts_of(3, 33, 66, seed=1)
    params = {**GREEDY, "max_new_tokens": 50}
    expected = generate(step_engine, prompts, params)
    assert generate(engine, prompts, params) == expected
    streamed = {
        c["index"]: c["output_ids"]
        for c in engine.generate(input_ids=prompts, sampling_params=params, stream=True)
    }
    assert [streamed[i] for i in range(len(prompts))] == expected


def test_demo_model_matches_a_plain_forward(demo: Any):
    folder = Path(jaxengine.DEMO_MODEL)
    tensors = {
        name: tensor.astype(np.float32)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    texts = ["ROMEO:\nWhat light", "First Citizen:\nBefore we proceed any further, hear me"]
    outputs = demo.generate(texts, {**GREEDY, "max_new_tokens": 40})
    for text, output in zip(texts, outputs, strict=True):
        prompt = demo.tokenizer(text)["input_ids"]
        config = read_model_config(folder)
        tiny.assert_greedy(prompt, output["output_ids"], tensors=tensors, config=config)


@pytest.mark.parametrize(
    "penalties",
    [
        {"frequency_penalty": 1.5},
        {"frequency_penalty": -0.5},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.9},
        {
            "frequency_penalty": 0.7,
            "presence_penalty": 0.5,
            "repetition_penalty": 1.5,
            "logit_bias": {"9": 6.0, "300": -50.0},
            "min_new_tokens": 10,
        },
    ],
    ids=lambda penalties: "+".join(penalties),
)
def test_penalties_are_those_of_sglang(engine: Any, penalties: dict[str, Any]):
    """Above all through preemption and over window edges, where counts must survive."""
    prompts = tiny.prompts_of(6, 20, 30, 7)
    outputs = engine.generate(
        input_ids=prompts, sampling_params={**GREEDY, **penalties, "max_new_tokens": 70}
    )
    assert sum(output["meta_info"]["num_retractions"] for output in outputs) > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output["output_ids"]) == 70
        tiny.assert_greedy(prompt, output["output_ids"], **penalties)


def test_penalties_change_something(engine: Any):
    [prompt] = tiny.prompts_of(6)
    plain = generate(engine, [prompt], {**GREEDY, "max_new_tokens": 60})
    for name, value in (
        ("frequency_penalty", 2.0),
        ("presence_penalty", 2.0),
        ("repetition_penalty", 2.0),
        ("logit_bias", {50: 5.0}),
    ):
        assert generate(engine, [prompt], {**GREEDY, "max_new_tokens": 60, name: value}) != plain


def test_requests_with_and_without_penalties_do_not_touch_each_other(engine: Any):
    prompts = tiny.prompts_of(8, 8, 8, 8)
    penalties: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 2.0},
        {"logit_bias": {33: 8.0}},
        {"frequency_penalty": 2.0},
    ]
    params = [{**GREEDY, **p, "max_new_tokens": 40} for p in penalties]
    for prompt, penalty, ids in zip(
        prompts, penalties, generate(engine, prompts, params), strict=True
    ):
        tiny.assert_greedy(prompt, ids, **penalty)


def test_a_slot_forgets_its_last_request(engine: Any):
    """Counts, biases and stop tokens of a finished request must not outlive it."""
    [prompt] = tiny.prompts_of(8)
    strange = {
        "frequency_penalty": 2.0,
        "logit_bias": {i: 9.0 for i in range(40, 60)},
        "stop_token_ids": list(range(2, 30)),
        "min_new_tokens": 5,
        "max_new_tokens": 30,
    }
    generate(engine, [prompt] * 8, strange)
    for ids in generate(engine, [prompt] * 8, {**GREEDY, "max_new_tokens": 30}):
        tiny.assert_greedy(prompt, ids)


def test_top_k_of_one_is_greedy(engine: Any):
    prompts = tiny.prompts_of(5, 40, 9)
    params = {"ignore_eos": True, "max_new_tokens": 30}
    greedy = generate(engine, prompts, {**params, "temperature": 0})
    assert generate(engine, prompts, {**params, "top_k": 1, "temperature": 1.7}) == greedy
    assert generate(engine, prompts, {**params, "top_p": 1e-6, "temperature": 1.7}) == greedy


def test_callers_in_many_threads_get_the_greedy_tokens_too(engine: Any):
    prompts = tiny.prompts_of(3, 50, 20, 8, 100, 31, 17, 64, seed=3)
    results: dict[int, list[int]] = {}

    def call(i: int) -> None:
        params = {**GREEDY, "max_new_tokens": 30 + i}
        for _ in range(3):
            if i % 2:
                [results[i]] = generate(engine, [prompts[i]], params)
            else:
                *_, last = engine.generate(
                    input_ids=prompts[i], sampling_params=params, stream=True
                )
                results[i] = last["output_ids"]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        assert len(results[i]) == 30 + i
        tiny.assert_greedy(prompt, results[i])
