"""Settings of an engine that every request of it feels."""

from typing import Any

import pytest

from jaxengine import Engine
from jaxengine.config import EngineConfig
from tests.engine import tiny
from tests.engine.conftest import POOL_TOKENS

[PROMPT] = tiny.prompts_of(9)


@pytest.fixture(scope="module")
def engine(settings: dict[str, Any], tokenizer: Any) -> Any:
    ours = {
        "allow_auto_truncate": True,
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
