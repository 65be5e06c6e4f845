"""What a caller gets: SGLang's dicts, key by key, the same in all four modes."""

import asyncio
import copy
import threading
import time
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from tests.engine import tiny

PROMPT = "ROMEO:\nWhat light"
GREEDY = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
META_KEYS = {
    "id",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "reasoning_tokens",
    "weight_version",
    "num_retractions",
    "seed",
}
LOGPROB_KEYS = {
    "input_token_logprobs",
    "output_token_logprobs",
    "output_token_logprobs_length",
    "output_token_processed_logprobs",
    "output_token_raw_logprobs",
}
OF_THIS_RUN = {"id", "e2e_latency", "response_sent_to_client_ts", "num_retractions"}


def four_ways(engine: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """Outputs of the same call in every mode; of a streamed one, the last chunk of each sample."""

    async def whole() -> Any:
        return await engine.async_generate(*args, **kwargs)

    async def streamed() -> list[dict[str, Any]]:
        stream = await engine.async_generate(*args, **kwargs, stream=True)
        return [chunk async for chunk in stream]

    chunks = [list(engine.generate(*args, **kwargs, stream=True)), asyncio.run(streamed())]
    return [
        engine.generate(*args, **kwargs),
        asyncio.run(whole()),
        *(last_chunks(run) for run in chunks),
    ]


def last_chunks(chunks: list[dict[str, Any]]) -> Any:
    if "index" not in chunks[-1]:
        return chunks[-1]
    last = {chunk["index"]: chunk for chunk in chunks}
    return [last[i] for i in sorted(last)]


def comparable(outputs: Any) -> Any:
    """Outputs without what differs between runs or between whole and streamed ones."""
    if isinstance(outputs, list):
        return [comparable(output) for output in outputs]
    meta = {k: v for k, v in outputs["meta_info"].items() if k not in OF_THIS_RUN}
    return {"text": outputs.get("text"), "output_ids": outputs["output_ids"], "meta_info": meta}


def test_output_has_the_keys_and_types_of_sglang(demo: Any):
    output = demo.generate(PROMPT, GREEDY)
    assert set(output) == {"text", "output_ids", "meta_info"}
    meta = output["meta_info"]
    assert set(meta) == META_KEYS | {"e2e_latency", "response_sent_to_client_ts"}
    assert isinstance(output["text"], str)
    assert {type(token_id) for token_id in output["output_ids"]} == {int}
    assert output["text"] == demo.tokenizer.decode(output["output_ids"])
    assert isinstance(meta["id"], str)
    assert meta["finish_reason"] == {"type": "length", "length": 20}
    assert meta["prompt_tokens"] == len(demo.tokenizer(PROMPT)["input_ids"])
    assert meta["completion_tokens"] == len(output["output_ids"]) == 20
    assert meta["cached_tokens"] == meta["reasoning_tokens"] == meta["num_retractions"] == 0
    assert meta["weight_version"] == "default"
    assert type(meta["seed"]) is int
    assert 0 < meta["e2e_latency"] < 60
    assert type(meta["response_sent_to_client_ts"]) is float


@pytest.mark.parametrize("is_list", [False, True])
def test_chunks_have_the_keys_of_sglang_and_deltas(demo: Any, is_list: bool):
    prompt = [PROMPT] if is_list else PROMPT
    chunks = list(demo.generate(prompt, GREEDY, stream=True))
    assert len(chunks) > 1
    expected = {"text", "output_ids", "meta_info", "delta_text", "delta_ids"}
    for i, chunk in enumerate(chunks):
        is_last = i == len(chunks) - 1
        meta = chunk["meta_info"]
        assert set(chunk) == (expected | {"index"} if is_list else expected)
        assert set(meta) == (
            META_KEYS
            | ({"e2e_latency"} if is_last else set())
            | ({"response_sent_to_client_ts"} if i == 0 else set())
        )
        assert meta["finish_reason"] == ({"type": "length", "length": 20} if is_last else None)
        assert meta["completion_tokens"] == len(chunk["output_ids"])
        so_far = chunks[: i + 1]
        assert chunk["text"] == "".join(c["delta_text"] for c in so_far)
        assert chunk["output_ids"] == [token_id for c in so_far for token_id in c["delta_ids"]]
    assert chunks[-1]["text"] == demo.generate(PROMPT, GREEDY)["text"]


def test_first_chunk_brings_the_first_token(engine: Any):
    [prompt] = tiny.prompts_of(9)
    with closing(engine.generate(input_ids=prompt, sampling_params=GREEDY, stream=True)) as chunks:
        assert len(next(chunks)["output_ids"]) == 1


def test_chunks_never_change_once_given(engine: Any):
    [prompt] = tiny.prompts_of(9)
    chunks, copies = [], []
    for chunk in engine.generate(
        input_ids=prompt, sampling_params=GREEDY, stream=True, return_logprob=True
    ):
        chunks.append(chunk)
        copies.append(copy.deepcopy(chunk))
    assert chunks == copies
    assert len({id(chunk["output_ids"]) for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize(
    "params",
    [GREEDY, {"temperature": 0.9, "top_p": 0.95, "seed": 11, "max_new_tokens": 20}],
    ids=["greedy", "seeded"],
)
@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT, "JULIET:\n"]], ids=["single", "list"])
def test_four_modes_agree(demo: Any, prompt: Any, params: dict[str, Any]):
    outputs = four_ways(demo, prompt, params)
    # A greedy request draws a seed as well, which decides nothing.
    for output in outputs if params is GREEDY else ():
        for sample in output if isinstance(output, list) else [output]:
            sample["meta_info"]["seed"] = None
    first, *others = map(comparable, outputs)
    assert others == [first] * 3


def test_text_and_its_ids_give_the_same(demo: Any):
    ids = demo.tokenizer(PROMPT)["input_ids"]
    by_text = demo.generate(PROMPT, GREEDY)
    for form in (ids, np.asarray(ids), np.asarray(ids, np.int64)):
        by_ids = demo.generate(input_ids=form, sampling_params=GREEDY)
        assert by_ids["text"] == by_text["text"]
        assert by_ids["output_ids"] == by_text["output_ids"]


def test_lists_come_back_in_order_and_a_list_of_one_is_a_list(engine: Any):
    prompts = tiny.prompts_of(5, 30, 2)
    outputs = engine.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [output["meta_info"]["prompt_tokens"] for output in outputs] == [5, 30, 2]
    [only] = engine.generate(input_ids=prompts[:1], sampling_params=GREEDY)
    assert only["output_ids"] == outputs[0]["output_ids"]
    assert isinstance(engine.generate(["a"], {"max_new_tokens": 1}), list)


def test_samples_of_a_prompt_stand_together(engine: Any):
    prompts = tiny.prompts_of(5, 7)
    params = {"n": 3, "max_new_tokens": 6, "ignore_eos": True, "seed": 1}
    outputs = engine.generate(input_ids=prompts, sampling_params=params)
    lengths = [output["meta_info"]["prompt_tokens"] for output in outputs]
    assert lengths == [5, 5, 5, 7, 7, 7]
    chunks = engine.generate(input_ids=prompts, sampling_params=params, stream=True)
    assert comparable(last_chunks(list(chunks))) == comparable(outputs)
    assert len(engine.generate(input_ids=prompts[0], sampling_params=params)) == 3


def test_no_prompts_give_no_outputs(engine: Any):
    async def streamed() -> list[Any]:
        return [chunk async for chunk in await engine.async_generate([], stream=True)]

    assert engine.generate([]) == []
    assert list(engine.generate([], stream=True)) == []
    assert asyncio.run(engine.async_generate([])) == []
    assert asyncio.run(streamed()) == []


def test_request_id_is_the_callers(engine: Any):
    prompts = tiny.prompts_of(3, 4)
    params = {"max_new_tokens": 2}
    output = engine.generate(input_ids=prompts[0], sampling_params=params, rid="mine")
    assert output["meta_info"]["id"] == "mine"
    outputs = engine.generate(input_ids=prompts, sampling_params=params, rid="mine")
    assert [o["meta_info"]["id"] for o in outputs] == ["mine_0", "mine_1"]


def test_engine_without_tokenizer_gives_ids_alone(make_engine: Any, engine: Any):
    [prompt] = tiny.prompts_of(12)
    bare = make_engine(skip_tokenizer_init=True)
    output = bare.generate(input_ids=prompt, sampling_params=GREEDY)
    assert set(output) == {"output_ids", "meta_info"}
    assert (
        output["output_ids"]
        == engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
    )
    chunks = list(bare.generate(input_ids=prompt, sampling_params=GREEDY, stream=True))
    assert all(set(chunk) == {"output_ids", "meta_info", "delta_ids"} for chunk in chunks)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logprobs_are_those_before_the_filters(engine: Any, temperature: float):
    [prompt] = tiny.prompts_of(20)
    penalties = {"frequency_penalty": 0.5, "logit_bias": {"7": 3.0}}
    params = {
        **penalties,
        "temperature": temperature,
        "top_k": 5,
        "max_new_tokens": 12,
        "ignore_eos": True,
    }
    for output in four_ways(engine, None, params, prompt, return_logprob=True):
        ids, meta = output["output_ids"], output["meta_info"]
        assert set(meta) >= LOGPROB_KEYS
        assert meta["input_token_logprobs"] == []
        assert meta["output_token_logprobs_length"] == len(ids) == 12
        logits = tiny.step_logits(prompt, ids, **penalties) / (temperature or 1.0)
        expected = tiny.log_softmax(logits)[np.arange(len(ids)), ids]
        values, token_ids, texts = zip(*meta["output_token_logprobs"], strict=True)
        assert token_ids == tuple(ids)
        assert set(texts) == {None}
        assert {type(value) for value in values} == {float}
        np.testing.assert_allclose(values, expected, atol=2e-4)


def test_logprobs_can_be_asked_for_prompt_by_prompt(engine: Any):
    prompts = tiny.prompts_of(5, 6)
    with_logprobs, without = engine.generate(
        input_ids=prompts, sampling_params=GREEDY, return_logprob=[True, False]
    )
    assert set(with_logprobs["meta_info"]) - set(without["meta_info"]) == LOGPROB_KEYS


def test_finish_reasons_have_the_forms_of_sglang(engine: Any):
    [prompt] = tiny.prompts_of(20)
    ids = engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"]
    greedy = {"temperature": 0, "max_new_tokens": 20}

    def reason(**params: Any) -> Any:
        output = engine.generate(input_ids=prompt, sampling_params={**greedy, **params})
        return output["meta_info"]["finish_reason"]

    assert reason(ignore_eos=True) == {"type": "length", "length": 20}
    assert reason(max_new_tokens=0) == {"type": "length", "length": 0}
    assert reason(stop_token_ids=[ids[4]]) == {"type": "stop", "matched": ids[4]}
    assert reason(logit_bias={"65": 100.0}, stop=["zzz", "``"]) == {"type": "stop", "matched": "``"}


def test_aborted_request_returns_what_it_has(engine: Any):
    [prompt] = tiny.prompts_of(4)
    params = {**GREEDY, "max_new_tokens": None}
    stream = engine.generate(input_ids=prompt, sampling_params=params, stream=True, rid="long")
    started = next(stream)
    engine.abort("nobody")
    engine.abort("long")
    *_, last = stream
    assert last["meta_info"]["finish_reason"] == {
        "type": "abort",
        "message": "Aborted",
        "status_code": None,
        "err_type": None,
    }
    count = len(last["output_ids"])
    assert len(started["output_ids"]) <= count < engine.config.max_total_tokens - len(prompt)
    assert last["meta_info"]["completion_tokens"] == count
    tiny.assert_greedy(prompt, last["output_ids"])


def test_aborted_request_need_not_have_started(engine: Any):
    [prompt] = tiny.prompts_of(4)
    outputs: list[dict[str, Any]] = []

    def generate() -> None:
        params = {**GREEDY, "max_new_tokens": 200}
        outputs.extend(engine.generate(input_ids=[prompt] * 6, sampling_params=params, rid="r"))

    caller = threading.Thread(target=generate)
    caller.start()
    while not engine.stats()["num_running"]:
        time.sleep(0.001)
    engine.abort("r_5")
    caller.join()
    *others, aborted = outputs
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert (aborted["output_ids"], aborted["text"]) == ([], "")
    for output in others:
        assert output["meta_info"]["finish_reason"] == {"type": "length", "length": 200}
        tiny.assert_greedy(prompt, output["output_ids"])


def test_only_running_requests_hold_their_id(engine: Any):
    [prompt] = tiny.prompts_of(4)
    params = {**GREEDY, "max_new_tokens": None}
    first = engine.generate(input_ids=prompt, sampling_params=params, stream=True, rid="once")
    next(first)
    with pytest.raises(ValueError, match="`rid` 'once' is already in flight"):
        engine.generate(input_ids=prompt, sampling_params=params, rid="once")
    first.close()
    second = engine.generate(input_ids=prompt, sampling_params=params, stream=True, rid="once")
    next(second)
    first.close()  # the id is the second's now
    engine.abort("once")
    *_, last = second
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
