"""One that fails among others becomes an output with on_error="return"; nobody else minds."""

import asyncio
from typing import Any

import pytest

from jaxengine.errors import NaNLogitsError, RequestError
from tests.engine import tiny
from tests.engine.conftest import POISON, assert_idle

GOOD = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True, "logit_bias": {POISON: -1000.0}}
PROMPTS = tiny.prompts_of(6, 20, 40, seed=2)
[TWIN] = tiny.prompts_of(30, seed=3)


def assert_failed(output: Any, type_name: str, words: str, num_tokens: int = 0) -> None:
    assert output["error"]["type"] == type_name and words in output["error"]["message"]
    finish = output["meta_info"]["finish_reason"]
    assert finish["type"] == "abort" and finish["err_type"] == type_name
    assert finish["message"] == output["error"]["message"]
    assert len(output["output_ids"]) == output["meta_info"]["completion_tokens"] == num_tokens


@pytest.mark.parametrize("mode", ["sync", "async", "stream"])
def test_failing_item_is_an_output_and_its_siblings_finish(poisoned_engine: Any, mode: str):
    prompts = [PROMPTS[0], [5, POISON, 7], PROMPTS[1], [5] * 300, PROMPTS[2], []]
    asked = {"input_ids": prompts, "sampling_params": GOOD, "on_error": "return", "rid": "x"}
    if mode == "sync":
        outputs = poisoned_engine.generate(**asked)
    elif mode == "async":
        outputs = asyncio.run(poisoned_engine.async_generate(**asked))
    else:
        chunks = list(poisoned_engine.generate(**asked, stream=True))
        outputs = [[c for c in chunks if c["index"] == i][-1] for i in range(len(prompts))]
        for i, output in enumerate(outputs):
            deltas = [c["delta_ids"] for c in chunks if c["index"] == i]
            assert [t for ids in deltas for t in ids] == output["output_ids"]
    for i in (0, 2, 4):
        assert "error" not in outputs[i]
        tiny.assert_greedy(prompts[i], outputs[i]["output_ids"])
    assert_failed(outputs[1], "NaNLogitsError", "Request x_1, after 0 tokens: the model gave NaN")
    assert_failed(outputs[3], "PromptTooLongError", "Prompt 3 has 300 tokens")
    assert_failed(outputs[5], "RequestError", "`input_ids` of prompt 5 is empty")
    assert [o["meta_info"]["id"] for o in outputs] == [f"x_{i}" for i in range(6)]
    # Code that reads the usual keys does not stumble over the others.
    keys = [o["meta_info"].keys() - {"response_sent_to_client_ts"} for o in outputs]
    assert all(k == keys[0] for k in keys)
    assert all(o["text"] == "" for o in outputs if "error" in o)
    assert_idle(poisoned_engine)


def test_failing_item_gives_what_there_was_of_it(poisoned_engine: Any):
    """A bias makes the model say the poisoned token; the logits after it are NaN."""
    bias = {"logit_bias": {POISON: 1000.0}, "temperature": 0, "max_new_tokens": 50}
    asked = {"input_ids": [TWIN], "sampling_params": bias, "return_logprob": True}
    [output] = poisoned_engine.generate(**asked, on_error="return")
    assert output["output_ids"] == [POISON]
    assert_failed(output, "NaNLogitsError", "after 1 tokens", num_tokens=1)
    assert len(output["meta_info"]["output_token_logprobs"]) == 1


def test_every_sample_of_a_refused_prompt_is_an_output(engine: Any):
    outputs = engine.generate(["the", ""], {"n": 2, "max_new_tokens": 3}, on_error="return")
    assert ["error" in output for output in outputs] == [False, False, True, True]
    [only] = engine.generate([""], {"max_new_tokens": 3}, on_error="return")
    assert_failed(only, "RequestError", "Prompt 0 is empty")
    assert_failed(engine.generate("", on_error="return"), "RequestError", "`prompt` is empty")


def test_raise_is_the_default_and_stops_the_siblings(poisoned_engine: Any):
    params = {**GOOD, "max_new_tokens": 200}
    with pytest.raises(NaNLogitsError):
        poisoned_engine.generate(input_ids=[TWIN, [POISON], TWIN], sampling_params=params)
    assert_idle(poisoned_engine)


class FailingTokenizer:
    """The tokenizer it wraps, which one text breaks."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, texts: list[str], **options: Any) -> Any:
        if "bad" in texts:
            raise ZeroDivisionError("the tokenizer stumbled")
        return self._tokenizer(texts, **options)


def test_text_the_tokenizer_fails_on_fails_alone(
    engine: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine._submitter._factory, "_tokenizer", FailingTokenizer(tokenizer))
    params = {"max_new_tokens": 3, "temperature": 0}
    outputs = engine.generate(["the", "bad", "a"], params, on_error="return")
    assert_failed(outputs[1], "ZeroDivisionError", "the tokenizer stumbled")
    assert ["error" in output for output in outputs] == [False, True, False]
    with pytest.raises(ZeroDivisionError):
        engine.generate(["the", "bad"], params)
    assert_idle(engine)
    assert len(engine.generate("the", params)["output_ids"]) == 3


def test_detokenizer_that_fails_fails_its_request_alone(
    engine: Any, monkeypatch: pytest.MonkeyPatch
):
    from jaxengine.text.detokenizer import Detokenizer

    push = Detokenizer.push

    def fail_on_stop(self: Any, ids: list[int], **options: Any) -> str:
        if self._stops:
            raise ZeroDivisionError("the detokenizer stumbled")
        return push(self, ids, **options)

    monkeypatch.setattr(Detokenizer, "push", fail_on_stop)
    params = [{"max_new_tokens": 30, "stop": "never"}, {"max_new_tokens": 3, "temperature": 0}]
    failed, good = engine.generate(["the", "the"], params, on_error="return")
    assert failed["error"] == {"type": "ZeroDivisionError", "message": "the detokenizer stumbled"}
    assert "error" not in good and len(good["output_ids"]) == 3
    with pytest.raises(ZeroDivisionError):
        engine.generate("the", params[0])
    assert_idle(engine)


def test_wrong_call_is_raised_whatever_on_error_says(engine: Any):
    with pytest.raises(RequestError, match="`rid` 'x' is given to prompts 0 and 1"):
        engine.generate(["a", "b"], rid=["x", "x"], on_error="return")
    with pytest.raises(RequestError, match="`on_error` must be one of raise, return, got 'skip'"):
        engine.generate("a", on_error="skip")
