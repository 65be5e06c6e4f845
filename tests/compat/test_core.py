"""What SGLang asserts of its engine's core, of this engine.

After test/registered/core: test_srt_engine.py, test_srt_endpoint.py, test_hidden_states.py,
test_score_api.py, test_deterministic.py, test_engine_child_pids.py, test_weight_version_spans.py.
"""

import asyncio
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.compat.shim import GOLDEN, generate
from tests.engine import tiny

GREEDY = {"temperature": 0, "max_new_tokens": 8}
PROMPTS = ["ROMEO:\nWhat light", "JULIET:\nO Romeo,", "First Citizen:\nBefore we"]


def text_of(output: dict[str, Any]) -> str:
    return output["text"]


def test_text_and_ids_give_the_same(demo: Any):
    ids = demo.tokenizer(PROMPTS[0])["input_ids"]
    by_text = demo.generate(PROMPTS[0], GREEDY)
    by_ids = demo.generate(input_ids=ids, sampling_params=GREEDY)
    assert text_of(by_text) == text_of(by_ids)


def test_sync_and_async_give_the_same(demo: Any):
    """In the order that breaks SGLang: sync, a loop, another loop (its PR #5162)."""
    first = text_of(demo.generate(PROMPTS[0], GREEDY))
    loop = asyncio.new_event_loop()
    second = loop.run_until_complete(demo.async_generate(PROMPTS[0], GREEDY))
    loop.close()
    third = asyncio.run(demo.async_generate(PROMPTS[0], GREEDY))
    assert first == text_of(second) == text_of(third)


def test_encode_sync_and_async_give_the_same(demo: Any):
    here = demo.encode(PROMPTS)
    there = asyncio.run(demo.async_encode(PROMPTS))
    for a, b in zip(here, there, strict=True):
        np.testing.assert_allclose(a["embedding"], b["embedding"], rtol=1e-3, atol=1e-4)


def test_shapes_of_generate(demo: Any):
    """Single, list, n, and streams of each."""
    assert isinstance(generate(demo, {"text": PROMPTS[0], "sampling_params": GREEDY}), dict)
    batch = generate(demo, {"text": PROMPTS, "sampling_params": GREEDY})
    assert [text_of(o) for o in batch] == [text_of(demo.generate(p, GREEDY)) for p in PROMPTS]
    many = generate(demo, {"text": PROMPTS[:2], "sampling_params": {**GREEDY, "n": 3}})
    assert [text_of(o) for o in many] == [text_of(o) for o in batch[:2] for _ in range(3)]
    chunks = list(demo.generate(PROMPTS, GREEDY, stream=True))
    last = {chunk["index"]: chunk for chunk in chunks}
    assert [text_of(last[i]) for i in range(3)] == [text_of(o) for o in batch]
    assert all(last[i]["meta_info"]["finish_reason"] for i in range(3))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_one_output_whatever_the_batch(demo: Any, batch_size: int):
    """`TestDeterministicBase`: single, mixed, and prompts that share a prefix, with seeds."""
    params = {"temperature": 1.0, "max_new_tokens": 16, "sampling_seed": 42, "seed_mode": "exact"}
    alone = text_of(demo.generate(PROMPTS[0], params))
    same = demo.generate([PROMPTS[0]] * batch_size, params)
    mixed = demo.generate([PROMPTS[0], *PROMPTS[1:]][:batch_size], params)
    shared = demo.generate([PROMPTS[0], PROMPTS[0] + " x"][:batch_size], params)
    assert {text_of(o) for o in (*same, mixed[0], shared[0])} == {alone}


def test_hidden_states_can_be_turned_on_and_off(demo: Any):
    """As many entries as tokens, in SGLang's form; a call that asks for none has none."""
    for wanted in (True, False, True):
        output = demo.generate(
            PROMPTS[1], GREEDY, return_hidden_states=wanted, hidden_states_format="sglang"
        )
        meta = output["meta_info"]
        assert ("hidden_states" in meta) == wanted
        if wanted:
            lists = meta["hidden_states"]
            assert len(lists) == meta["completion_tokens"]
            assert len(lists[0]) == meta["prompt_tokens"] and len(lists[1]) == 256


def test_hidden_states_of_a_whole_text_are_those_of_its_parts(demo: Any):
    """What `test_hidden_states.py` compares with transformers, compared with a prefill."""
    output = demo.generate(PROMPTS[1], GREEDY, return_hidden_states=True)
    ids = demo.tokenizer(PROMPTS[1])["input_ids"] + output["output_ids"]
    whole = demo.generate(
        input_ids=ids, sampling_params={"max_new_tokens": 0}, return_hidden_states=True
    )
    states = [o["meta_info"]["hidden_states"] for o in (output, whole)]
    assert len(states[0]) == len(ids)
    np.testing.assert_allclose(states[0], states[1], rtol=1e-2, atol=1e-3)


def test_scores_sum_to_one_and_are_transformers(demo: Any):
    """The golden logits are those of transformers, at some places of three texts."""
    golden = load_file(GOLDEN)
    for i in range(3):
        ids, positions = golden[f"input_ids.{i}"], golden[f"positions.{i}"]
        for position, logits in zip(positions.tolist(), golden[f"logits.{i}"], strict=True):
            labels = np.argsort(-logits)[:5].tolist()
            text = ids[: position + 1].tolist()
            [got] = demo.score(text[:-1], [text[-1:]], labels, apply_softmax=True)
            wanted = np.exp(tiny.log_softmax(logits[labels]))
            np.testing.assert_allclose(got, wanted, rtol=0.02)
            assert sum(got) == pytest.approx(1)
            [raw] = demo.score(text[:-1], [text[-1:]], labels)
            np.testing.assert_allclose(raw, np.exp(tiny.log_softmax(logits))[labels], rtol=0.02)


def test_scores_item_first_and_of_nothing(demo: Any):
    a, b = demo.tokenizer(["What light", " is this"])["input_ids"]
    labels = [10, 20]
    assert demo.score(a, [b], labels) == demo.score(b, [a], labels, item_first=True)
    assert demo.score(a, [], labels) == []


def test_there_are_no_children(demo: Any):
    assert demo.get_all_child_pids() == []


def test_server_info(demo: Any):
    info = demo.get_server_info()
    assert info["max_total_num_tokens"] > 0 and info["internal_states"][0]["seconds"]
    assert demo.get_model_info()["model_path"] == info["model_path"]
