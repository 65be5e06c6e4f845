"""A bad request gets an error that names what is wrong with it, and touches nobody else."""

import asyncio
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jaxengine.errors import NaNLogitsError, PromptTooLongError, RequestError, StepError
from jaxengine.scheduler.plan import DecodePlan
from tests.engine import tiny
from tests.engine.conftest import POISON, assert_idle

GREEDY = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
[PROMPT] = tiny.prompts_of(6)
VOCAB = tiny.CONFIG.vocab_size

# What is passed to `generate`, the error, and words of its message.
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, RequestError, "`prompt`, `input_ids` or `input_embeds` must be given"),
    ({"prompt": ""}, RequestError, "`prompt` is empty"),
    ({"prompt": ["the", ""]}, RequestError, "Prompt 1 is empty"),
    ({"prompt": 5}, RequestError, "`prompt` must be a string"),
    ({"prompt": ["the", None]}, RequestError, "Prompt 1 must be a string"),
    ({"prompt": [1, 2]}, RequestError, "`input_ids`"),
    ({"input_ids": []}, RequestError, "`input_ids` is empty"),
    ({"input_ids": [[]]}, RequestError, "`input_ids` of prompt 0 is empty"),
    ({"input_ids": [[4], []]}, RequestError, "`input_ids` of prompt 1 is empty"),
    ({"input_ids": np.zeros((2, 0), int)}, RequestError, "`input_ids` of prompt 0 is empty"),
    ({"input_ids": [4, VOCAB]}, RequestError, f"[0, {VOCAB}); got {VOCAB} at position 1"),
    ({"input_ids": [[4], [-1]]}, RequestError, "`input_ids` of prompt 1 must be in the vocabulary"),
    ({"input_ids": [2**40]}, RequestError, "vocabulary"),
    ({"input_ids": [1.5]}, RequestError, "integers"),
    ({"input_ids": ["a"]}, RequestError, "integers"),
    ({"input_ids": "the"}, RequestError, "`input_ids` must be a list"),
    ({"prompt": "the", "input_ids": [4]}, RequestError, "both given"),
    ({"input_ids": [5] * 256}, PromptTooLongError, "`context_length` is 256"),
    ({"input_ids": [[4], [5] * 1000]}, PromptTooLongError, "Prompt 1 has 1,000 tokens"),
    ({"input_ids": [5] * 250}, PromptTooLongError, "the KV pages hold 240"),
    ({"prompt": "a" * 2000}, PromptTooLongError, "Prompt 0 has"),
    ({"prompt": ["a", "b"], "sampling_params": [{}]}, RequestError, "1 entries for 2 prompts"),
    ({"prompt": "a", "sampling_params": [{}]}, RequestError, "`sampling_params` is a list"),
    ({"prompt": ["a"], "return_logprob": [True] * 2}, RequestError, "`return_logprob` has 2"),
    ({"prompt": ["a", "b"], "rid": ["x", "x"]}, RequestError, "`rid` 'x' is given to prompts"),
    ({"prompt": "a", "sampling_params": {"top_p": 2.0}}, RequestError, "`top_p` must be a number"),
    (
        {"prompt": ["a", "b"], "sampling_params": [{}, {"temperature": -1}]},
        RequestError,
        "`temperature` of prompt 1 must be",
    ),
    ({"prompt": "a", "sampling_params": {"top_k": 0}}, RequestError, "`top_k` must be -1"),
    ({"prompt": "a", "sampling_params": {"n": 0}}, RequestError, "`n` must be"),
    ({"prompt": "a", "sampling_params": {"topk": 4}}, TypeError, "did you mean `top_k`"),
    ({"prompt": "a", "sampling_parms": {}}, TypeError, "did you mean `sampling_params`"),
    ({"prompt": "a", "temperature": 0}, TypeError, "put it into `sampling_params`"),
    ({"prompt": "a", "seed": 0}, TypeError, "put it into `sampling_params`"),
    ({"prompt": "a", "max_tokens": 5}, TypeError, "did you mean `max_new_tokens`"),
    ({"prompt": "a", "image_data": "x.png"}, RequestError, "`image_data` is not supported"),
    ({"prompt": "a", "lora_path": "x"}, RequestError, "`lora_path` is not supported"),
    ({"prompt": "a", "sampling_params": {"regex": "a+"}}, RequestError, "`regex` is not supported"),
    (
        {"prompt": "a", "sampling_params": {"stop_token_ids": [*range(2, 66)]}},
        RequestError,
        "`stop_token_ids`",
    ),
]


@pytest.mark.parametrize(
    "call, error, words", BAD_CALLS, ids=[str(call)[:60] for call, *_ in BAD_CALLS]
)
def test_bad_call_is_refused_by_name_and_the_next_is_answered(
    engine: Any, call: dict[str, Any], error: type[Exception], words: str
):
    for stream in (False, True):
        with pytest.raises(error, match=re.escape(words)):
            engine.generate(**call, stream=stream)
        with pytest.raises(error, match=re.escape(words)):
            asyncio.run(engine.async_generate(**call, stream=stream))
    if error is not TypeError:
        assert issubclass(error, ValueError)
    assert_idle(engine)
    output = engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    tiny.assert_greedy(PROMPT, output["output_ids"])


def test_text_needs_a_tokenizer(make_engine: Any):
    engine = make_engine(skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="`prompt` needs a tokenizer"):
        engine.generate("the")
    with pytest.raises(RequestError, match="`stop` is unavailable"):
        engine.generate(input_ids=PROMPT, sampling_params={"stop": "x"})


def test_longest_prompt_fits(engine: Any, step_engine: Any):
    for one, length in ((engine, 239), (step_engine, 255)):
        [prompt] = tiny.prompts_of(length)
        output = one.generate(input_ids=prompt, sampling_params=GREEDY)
        assert output["meta_info"]["finish_reason"] == {"type": "length", "length": 1}
        tiny.assert_greedy(prompt, output["output_ids"])


def test_bad_requests_do_not_disturb_those_that_run(engine: Any):
    stop = []

    def be_bad() -> int:
        count = 0
        while not stop:
            call, error, _ = BAD_CALLS[count % len(BAD_CALLS)]
            with pytest.raises(error):
                engine.generate(**call)
            count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        bad = pool.submit(be_bad)
        for _ in range(5):
            output = engine.generate(
                input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 100}
            )
            tiny.assert_greedy(PROMPT, output["output_ids"])
        stop.append(True)
        assert bad.result() > 0


def test_failed_device_step_fails_its_requests_and_no_others(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
):
    """The device state is lost with the step; those who wait or were preempted start anew."""
    engine = make_engine()
    runner = engine._core._runner
    dispatch = runner.dispatch
    failed: list[int] = []
    all_are_queued = threading.Event()

    def fail_once(plan: Any) -> Any:
        assert all_are_queued.wait(60)
        handle = dispatch(plan)
        if isinstance(plan, DecodePlan) and len(plan.rows) == 4 and not failed:
            failed.extend(plan.seq_ids)
            raise ZeroDivisionError("the device is gone")
        return handle

    monkeypatch.setattr(runner, "dispatch", fail_once)
    prompts = tiny.prompts_of(4, 5, 6, 7, 8, 9, 10)

    async def run() -> list[Any]:
        calls = [engine.async_generate(input_ids=p, sampling_params=GREEDY) for p in prompts]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0)  # each runs up to its first wait, which is after it was queued
        all_are_queued.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outputs = asyncio.run(run())
    assert len(failed) == 4
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if i in failed:
            assert isinstance(output, StepError)
            assert "ZeroDivisionError: the device is gone" in str(output)
        else:
            tiny.assert_greedy(prompt, output["output_ids"])
    assert_idle(engine)


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_p": 0.9, "min_p": 0.01}, {"frequency_penalty": 1.0}]
)
def test_nan_logits_fail_their_request_alone(poisoned_engine: Any, params: dict[str, Any]):
    """Neighbours share its prefills, its windows and, later, its pages."""
    bad = [*PROMPT, POISON, *PROMPT]
    prompts = tiny.prompts_of(20, 5, 40, 11, seed=1)
    assert POISON not in [token_id for prompt in prompts for token_id in prompt]
    greedy = {**GREEDY, "logit_bias": {POISON: -1000.0}}

    async def run() -> list[Any]:
        calls = [
            poisoned_engine.async_generate(input_ids=prompt, sampling_params=p, rid=rid)
            for prompt, p, rid in [
                (prompts[0], greedy, "a"),
                (bad, params, "bad"),
                (prompts[1], greedy, "b"),
                (prompts[2], greedy, "c"),
                (prompts[3], greedy, "d"),
            ]
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    for _ in range(3):
        first, error, *others = asyncio.run(run())
        assert isinstance(error, NaNLogitsError)
        assert "Request bad, after 0 tokens: the model gave NaN logits" in str(error)
        for prompt, output in zip(prompts, [first, *others], strict=True):
            tiny.assert_greedy(prompt, output["output_ids"])


def test_nan_in_the_middle_of_a_stream_ends_it_after_what_was_good(poisoned_engine: Any):
    """A bias makes the model say the poisoned token; the logits after it are NaN."""
    bias = {"logit_bias": {POISON: 1000.0}, "temperature": 0, "max_new_tokens": 50}
    chunks = []
    with pytest.raises(NaNLogitsError, match="after 1 tokens"):
        for chunk in poisoned_engine.generate(input_ids=PROMPT, sampling_params=bias, stream=True):
            chunks.append(chunk)
    assert [chunk["output_ids"] for chunk in chunks] in ([], [[POISON]])
    assert_idle(poisoned_engine)


def test_nan_in_a_list_fails_the_call_and_stops_its_siblings(poisoned_engine: Any):
    good = {**GREEDY, "max_new_tokens": 200, "logit_bias": {POISON: -1000.0}}
    with pytest.raises(NaNLogitsError):
        poisoned_engine.generate(input_ids=[PROMPT, [POISON], PROMPT, PROMPT], sampling_params=good)
    assert_idle(poisoned_engine)
