"""Settings of an engine that every request of it feels."""

from typing import Any

import pytest

from jaxengine import Engine, stream_and_merge
from jaxengine.config import EngineConfig
from tests.engine import tiny
from tests.engine.conftest import POOL_TOKENS

[PROMPT] = tiny.prompts_of(9)


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any], tokenizer: Any) -> Any:
    ours = {
        "allow_auto_truncate": True,
        "stream_output": True,
        "stream_interval": 2,
        "weight_version": "step-7",
        "preferred_sampling_params": {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True},
    }
    config = EngineConfig.from_kwargs({**settings, **ours})
    with Engine(config, **tiny.engine_arguments(), tokenizer=tokenizer) as engine:
        yield engine


def test_preferred_parameters_are_under_those_of_a_request(engine: Any):
    ids = engine.generate(input_ids=PROMPT)["output_ids"]
    assert len(ids) == 3
    tiny.assert_greedy(PROMPT, ids)
    longer = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 5})["output_ids"]
    assert (len(longer), longer[:3]) == (5, ids)


def test_prompts_that_are_too_long_lose_their_end(engine: Any, caplog: pytest.LogCaptureFixture):
    [long] = tiny.prompts_of(300, seed=5)
    output = engine.generate(input_ids=[long], return_logprob=True)[0]
    fitting = long[: POOL_TOKENS - 1]
    assert output["meta_info"]["prompt_tokens"] == len(fitting)
    assert output["meta_info"]["finish_reason"] == {"type": "length", "length": 1}
    tiny.assert_greedy(fitting, output["output_ids"])
    assert f"Prompt 0 of 300 tokens is cut to {len(fitting)}" in caplog.text


def test_streams_hold_what_is_new_alone(engine: Any, tokenizer: Any):
    asked = {"max_new_tokens": 9}
    whole = engine.generate(input_ids=PROMPT, sampling_params=asked, return_logprob=True)
    chunks = list(
        engine.generate(input_ids=PROMPT, sampling_params=asked, return_logprob=True, stream=True)
    )
    assert len(chunks) > 1
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert [i for chunk in chunks for i in chunk["output_ids"]] == whole["output_ids"]
    logprobs = [x for chunk in chunks for x in chunk["meta_info"]["output_token_logprobs"]]
    assert [token for _, token, _ in logprobs] == whole["output_ids"]
    assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks][-1] == 9
    assert {chunk["meta_info"]["weight_version"] for chunk in chunks} == {"step-7"}
    merged = stream_and_merge(engine, "the fox", asked)
    assert merged == engine.generate("the fox", asked)["text"]
