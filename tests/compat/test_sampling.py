"""What SGLang asserts of penalties, logit processors, stops and lengths.

After test/registered/sampling: test_penalty.py, test_pytorch_sampling_backend.py;
core/test_srt_endpoint.py (`custom_logit_processor*`); and
openai_server/validation: test_matched_stop.py, test_request_length_validation.py,
test_large_max_new_tokens.py, test_openai_server_ignore_eos.py.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import pytest

from jaxengine.errors import RequestError
from jaxengine.sampling import LogitsTransform, Param
from tests.engine import tiny

PROMPT, OTHER = tiny.prompts_of(12, 5, seed=61)
PENALTIES = [
    {"frequency_penalty": 2},
    {"frequency_penalty": -2},
    {"presence_penalty": 2},
    {"presence_penalty": -2},
    {"repetition_penalty": 1.7},
    {"min_new_tokens": 16},
    {"frequency_penalty": 1.2, "presence_penalty": 0.4, "repetition_penalty": 1.3},
    {"frequency_penalty": 0.5, "presence_penalty": -1, "min_new_tokens": 9},
]


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalties_alone_and_mixed(engine: Any, penalties: dict[str, Any]):
    """Greedy, so that each token is the best of the penalised numpy logits."""
    params = {"temperature": 0, "max_new_tokens": 16, **penalties}
    ids = engine.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]
    assert len(ids) >= penalties.get("min_new_tokens", 0)
    tiny.assert_greedy(PROMPT, ids, **penalties)


def test_penalties_of_many_in_one_batch(engine: Any):
    params = [{"temperature": 0, "max_new_tokens": 16, **p} for p in PENALTIES]
    outputs = engine.generate(input_ids=[PROMPT] * len(params), sampling_params=params)
    for penalties, output in zip(PENALTIES, outputs, strict=True):
        tiny.assert_greedy(PROMPT, output["output_ids"], **penalties)


def test_greedy_five_times_alone_and_in_a_batch(engine: Any):
    params = {"temperature": 0, "max_new_tokens": 24}
    alone = [engine.generate(input_ids=PROMPT, sampling_params=params) for _ in range(5)]
    batch = engine.generate(input_ids=[PROMPT] * 5, sampling_params=params)
    assert len({tuple(output["output_ids"]) for output in (*alone, *batch)}) == 1


def force(logits, state, ctx):
    """SGLang's `DeterministicLogitProcessor`, which counts a `delay` down in its dict, in one."""
    ids, wanted = jnp.arange(logits.shape[-1]), ctx.token_id[:, None]
    is_forced = (wanted >= 0) & (ctx.num_generated >= ctx.delay)[:, None]
    return jnp.where(is_forced & (ids != wanted), -jnp.inf, logits)


FORCED = LogitsTransform(force, params={"token_id": Param("int32", -1), "delay": Param("int32", 0)})


def test_custom_logit_processor_in_a_mixed_batch(engine: Any):
    """`test_custom_logit_processor_batch_mixed`: some rows have it, all come in one batch."""
    params = [
        {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True},
        {"max_new_tokens": 6, "ignore_eos": True, "custom_params": {"token_id": 7}},
    ] * 2
    outputs = engine.generate(
        input_ids=[PROMPT] * 4, sampling_params=params, custom_logit_processor=FORCED
    )
    tiny.assert_greedy(PROMPT, outputs[0]["output_ids"])
    assert [o["output_ids"] for o in outputs[1::2]] == [[7] * 6] * 2


def test_a_processor_that_waits(engine: Any):
    """`test_stateful_custom_logit_processor`: some tokens are free, the others forced."""
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    ids = engine.generate(
        input_ids=PROMPT,
        sampling_params={**params, "custom_params": {"token_id": 11, "delay": 3}},
        custom_logit_processor=FORCED,
    )["output_ids"]
    assert ids[3:] == [11] * 3
    tiny.assert_greedy(PROMPT, ids[:3])


def test_a_processor_comes_after_the_bias_and_before_the_temperature(engine: Any):
    """Logprobs see its effect, and it may undo a bias."""
    params = {"temperature": 0.5, "max_new_tokens": 1, "logit_bias": {"5": -1e9}, "seed": 0}
    output = engine.generate(
        input_ids=PROMPT,
        sampling_params={**params, "custom_params": {"token_id": 5}},
        custom_logit_processor=FORCED,
        return_logprob=True,
    )
    assert output["output_ids"] == [5]
    assert output["meta_info"]["output_token_logprobs"][0][0] == pytest.approx(0)


def test_a_pickled_processor_is_never_unpickled(engine: Any):
    with pytest.raises(RequestError, match="never unpickled"):
        engine.generate(input_ids=PROMPT, custom_logit_processor='{"callable": "8004952e"}')


def test_what_matched(engine: Any, tokenizer: Any):
    """`test_matched_stop.py`: a string, a token, nothing."""
    params = {"temperature": 0, "max_new_tokens": 20, "ignore_eos": True}
    whole = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert whole["meta_info"]["finish_reason"] == {"type": "length", "length": 20}
    token = whole["output_ids"][5]
    first = whole["output_ids"].index(token)
    by_token = {**params, "ignore_eos": False, "stop_token_ids": [token]}
    output = engine.generate(input_ids=PROMPT, sampling_params=by_token)
    assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
    assert output["output_ids"] == whole["output_ids"][: first + 1]
    letter = next(c for c in whole["text"] if c.isalpha())
    output = engine.generate(input_ids=PROMPT, sampling_params={**params, "stop": letter})
    assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": letter}
    assert output["text"] == whole["text"][: whole["text"].index(letter)]


def test_a_pattern_is_trimmed_and_named(engine: Any):
    """SGLang leaves what a `stop_regex` matched in the text; here it is cut, as a string is."""
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    whole = engine.generate(input_ids=PROMPT, sampling_params=params)["text"]
    letter = next(c for c in whole if c.isalpha())
    pattern = f"[{letter}]"
    for stream in (False, True):
        output = engine.generate(
            input_ids=PROMPT, sampling_params={**params, "stop_regex": pattern}, stream=stream
        )
        if stream:
            *chunks, output = output
            assert "".join(c["delta_text"] for c in (*chunks, output)) == output["text"]
        assert output["text"] == whole[: whole.index(letter)]
        assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": pattern}


def test_bad_patterns_are_refused(engine: Any):
    with pytest.raises(RequestError, match="`stop_regex` '\\(' is no regular expression"):
        engine.generate(input_ids=PROMPT, sampling_params={"stop_regex": "("})


@pytest.mark.parametrize("interval", [1, 5, 100])
def test_stream_interval(engine: Any, interval: int):
    """The first token at once, then at least so many together, and the end."""
    params = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    asked = {**params, "stream_interval": interval}
    chunks = list(engine.generate(input_ids=PROMPT, sampling_params=asked, stream=True))
    sizes = [len(chunk["delta_ids"]) for chunk in chunks]
    assert sizes[0] == 1 and sum(sizes) == 40
    assert all(size >= interval for size in sizes[1:-1])
    if interval == 100:
        assert sizes == [1, 39]


def test_a_prompt_longer_than_the_context(engine: Any):
    """`test_request_length_validation.py`; the message says both lengths."""
    with pytest.raises(ValueError, match="256 tokens; `context_length` is 256"):
        engine.generate(input_ids=[5] * 256)


def test_many_with_a_huge_limit(engine: Any):
    """`test_large_max_new_tokens.py`: all run, and are clipped to what there is room for."""
    params = {"temperature": 0, "max_new_tokens": 10**6}
    with ThreadPoolExecutor() as pool:
        runs = [
            pool.submit(engine.generate, input_ids=PROMPT, sampling_params=params) for _ in range(4)
        ]
        reasons = [run.result()["meta_info"]["finish_reason"] for run in runs]
    assert all(r["type"] == "stop" or r["length"] == 240 - len(PROMPT) for r in reasons)
    assert len({str(reason) for reason in reasons}) == 1


def test_ignore_eos_goes_on_to_the_limit(engine: Any):
    """Also past a stop token of the user's own, as in SGLang."""
    params = {"max_new_tokens": 30, "logit_bias": {"0": 1e4}, "stop_token_ids": [3]}
    short = engine.generate(input_ids=OTHER, sampling_params=params)
    assert short["meta_info"]["finish_reason"] == {"type": "stop", "matched": 0}
    long = engine.generate(input_ids=OTHER, sampling_params={**params, "ignore_eos": True})
    assert long["meta_info"]["finish_reason"] == {"type": "length", "length": 30}
