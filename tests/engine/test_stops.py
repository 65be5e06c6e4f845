"""What ends a text, and where: tokens, strings, lengths; windows must not show."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.engine import tiny
from tests.engine.conftest import assert_idle
from tests.engine.tiny import EOS

GREEDY = {"temperature": 0, "max_new_tokens": 60}
[PROMPT] = tiny.prompts_of(10, seed=5)


def free_run(engine: Any, **params: Any) -> list[int]:
    """What comes when nothing stops it."""
    params = {**GREEDY, **params, "ignore_eos": True}
    return engine.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]


def last_of(chunks: Iterator[dict[str, Any]]) -> dict[str, Any]:
    *_, last = chunks
    return last


def stop_strings_over_token_borders(tokenizer: Any, ids: list[int]) -> list[str]:
    """Strings that begin in one token and end in the next, at as many places as there are."""
    texts = [tokenizer.decode([token_id]) for token_id in ids]
    return [
        left[-1] + right[0]
        for left, right in pairwise(texts)
        if left and right and (left + right).isascii()
    ]


def step_by_step(tokenizer: Any, ids: list[int], stop: str) -> tuple[list[int], str]:
    """The ids and the text of an engine that looks at the text after every token."""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count])
        if stop in text:
            return ids[:count], text[: text.index(stop)]
    raise AssertionError(f"{stop!r} never comes")


def test_stop_strings_over_any_edge_end_the_text_where_single_steps_would(
    engine: Any, step_engine: Any, tokenizer: Any
):
    # A bias towards printable tokens, so that there are strings to stop at.
    bias = {token_id: 4.0 for token_id in range(3, 96)}
    ids = free_run(engine, logit_bias=bias)
    stops = stop_strings_over_token_borders(tokenizer, ids)
    expected = [step_by_step(tokenizer, ids, stop) for stop in stops]
    lengths = {len(kept) for kept, _ in expected}
    # Matches end on both sides of the edges of windows of 8 and of 32 steps.
    assert len(lengths) > 12
    assert lengths & {1, 2, 8, 9, 10}
    assert lengths & {32, 33, 34, 35}
    params = [
        {**GREEDY, "logit_bias": bias, "ignore_eos": True, "stop": [s, "\n\n\n"]} for s in stops
    ]
    prompts = [PROMPT] * len(stops)
    whole = engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)
    single_steps = step_engine.generate(input_ids=prompts, sampling_params=params)
    chunks = list(engine.generate(input_ids=prompts, sampling_params=params, stream=True))
    streamed = [last_of(c for c in chunks if c["index"] == i) for i in range(len(stops))]
    for i, (kept, text) in enumerate(expected):
        for output in (whole[i], single_steps[i], streamed[i]):
            assert (output["output_ids"], output["text"]) == (kept, text)
            meta = output["meta_info"]
            assert meta["finish_reason"] == {"type": "stop", "matched": stops[i]}
            assert meta["completion_tokens"] == len(kept)
        assert len(whole[i]["meta_info"]["output_token_logprobs"]) == len(kept)
        deltas = [c["delta_text"] for c in chunks if c["index"] == i]
        assert "".join(deltas) == text


def test_stop_string_stays_when_asked(engine: Any, tokenizer: Any):
    bias = {token_id: 4.0 for token_id in range(3, 96)}
    ids = free_run(engine, logit_bias=bias)
    stop = stop_strings_over_token_borders(tokenizer, ids)[-1]
    kept, text = step_by_step(tokenizer, ids, stop)
    params = {**GREEDY, "logit_bias": bias, "ignore_eos": True, "stop": stop}
    trimmed = engine.generate(input_ids=PROMPT, sampling_params=params)
    untrimmed = engine.generate(input_ids=PROMPT, sampling_params={**params, "no_stop_trim": True})
    assert trimmed["text"] == text
    assert untrimmed["text"] == text + stop
    assert untrimmed["output_ids"] == trimmed["output_ids"] == kept


def test_stopped_text_gives_its_pages_back_at_once(engine: Any):
    """A stop string is found by the host; the device must not go on to the length limit."""
    before = engine.stats()["num_generated_tokens"]
    bias = {"65": 100.0}
    params = {"temperature": 0, "max_new_tokens": 220, "logit_bias": bias, "stop": "``"}
    output = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert output["output_ids"] == [65, 65]
    engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 1})  # runs after the end
    # A window was in flight beside the one it was found in, and one more while it was searched.
    assert engine.stats()["num_generated_tokens"] - before < 150
    assert_idle(engine)


@pytest.mark.parametrize("place", [0, 1, 7, 8, 9, 31, 32, 33, 58])
def test_stop_tokens_end_the_text_wherever_the_window_ends(
    engine: Any, step_engine: Any, place: int
):
    ids = free_run(engine)
    end = ids.index(ids[place])  # the first time this token comes
    params = {**GREEDY, "ignore_eos": False, "stop_token_ids": [ids[place]]}
    for output in (
        engine.generate(input_ids=PROMPT, sampling_params=params),
        step_engine.generate(input_ids=PROMPT, sampling_params=params),
        last_of(engine.generate(input_ids=PROMPT, sampling_params=params, stream=True)),
    ):
        assert output["output_ids"] == ids[: end + 1]
        assert output["text"] == engine.tokenizer.decode(ids[:end])
        assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[place]}
        assert output["meta_info"]["completion_tokens"] == end + 1
    shown = engine.generate(input_ids=PROMPT, sampling_params={**params, "no_stop_trim": True})
    assert shown["text"] == engine.tokenizer.decode(ids[: end + 1])


def test_models_own_end_token_stops(engine: Any):
    params = {**GREEDY, "logit_bias": {EOS: 100.0}}
    output = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert output["output_ids"] == [EOS]
    assert output["text"] == ""
    assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}


def test_end_token_as_the_last_allowed_one_is_a_length(engine: Any):
    params = {**GREEDY, "logit_bias": {EOS: 100.0}, "max_new_tokens": 1}
    output = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert output["output_ids"] == [EOS]
    assert output["meta_info"]["finish_reason"] == {"type": "length", "length": 1}


def test_ignore_eos_disables_every_stop_token_but_no_stop_string(engine: Any):
    params = {
        **GREEDY,
        "logit_bias": {EOS: 100.0},
        "ignore_eos": True,
        "max_new_tokens": 40,
        "stop_token_ids": [EOS, 7],
    }
    output = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert output["output_ids"] == [EOS] * 40
    assert output["text"] == ""
    params |= {"stop": "<|endoftext|><|endoftext|>"}
    output = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert output["output_ids"] == [EOS] * 2
    params = {**params, "logit_bias": {7: 100.0}, "stop": None}
    output = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert output["output_ids"] == [7] * 40


def test_special_tokens_are_shown_when_asked(engine: Any):
    params = {**GREEDY, "logit_bias": {1: 100.0}, "max_new_tokens": 2}
    hidden = engine.generate(input_ids=PROMPT, sampling_params=params)
    shown = engine.generate(
        input_ids=PROMPT, sampling_params={**params, "skip_special_tokens": False}
    )
    assert (hidden["text"], shown["text"]) == ("", "<|im_end|><|im_end|>")


@pytest.mark.parametrize("count", [1, 5, 8, 9, 33])
def test_min_new_tokens_holds_back_every_stop_token(engine: Any, count: int):
    bias = {EOS: 100.0, 7: 90.0}
    params = {
        **GREEDY,
        "logit_bias": bias,
        "stop_token_ids": [7],
        "min_new_tokens": count,
    }
    output = engine.generate(input_ids=PROMPT, sampling_params=params)
    assert len(output["output_ids"]) == count + 1
    assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
    tiny.assert_greedy(
        PROMPT,
        output["output_ids"],
        min_new_tokens=count,
        stop_ids=(EOS, 7),
        logit_bias=bias,
    )


def test_lengths_are_clipped_to_the_context_and_the_pool(engine: Any, step_engine: Any):
    for one, room in ((engine, engine.config.max_total_tokens), (step_engine, 256)):
        for asked in (None, 10_000):
            output = one.generate(
                input_ids=PROMPT,
                sampling_params={"temperature": 0, "ignore_eos": True, "max_new_tokens": asked},
            )
            length = room - len(PROMPT)
            assert output["meta_info"]["finish_reason"] == {"type": "length", "length": length}
            tiny.assert_greedy(PROMPT, output["output_ids"])


def test_default_length_is_128(engine: Any):
    output = engine.generate(input_ids=PROMPT, sampling_params={"ignore_eos": True})
    assert output["meta_info"]["finish_reason"] == {"type": "length", "length": 128}


def test_text_is_exact_through_invalid_utf8_and_characters_of_many_bytes(
    engine: Any, tokenizer: Any
):
    """Random bytes, mostly: every split of every character comes up."""
    params = {"max_new_tokens": 100, "ignore_eos": True, "temperature": 3.0, "n": 4, "seed": 0}
    for i, output in enumerate(engine.generate(input_ids=PROMPT, sampling_params=params)):
        assert output["text"] == tokenizer.decode(output["output_ids"], skip_special_tokens=True)
        one = {**params, "n": 1, "seed": output["meta_info"]["seed"]}
        chunks = list(engine.generate(input_ids=PROMPT, sampling_params=one, stream=True))
        assert "".join(chunk["delta_text"] for chunk in chunks) == output["text"], i
        assert "�" in output["text"]
