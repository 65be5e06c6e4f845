"""Logprobs of tokens, of the most likely ones, of given ids, over the output and the prompt."""

from typing import Any

import numpy as np
import pytest

from jaxengine.errors import RequestError
from jaxengine.types import MAX_LOGPROB_IDS
from tests.engine import tiny

PROMPT, OTHER = tiny.prompts_of(40, 9)
GIVEN = [5, 300, 7]
PARAMS = {"temperature": 0.7, "top_k": 12, "seed": 4, "max_new_tokens": 14, "ignore_eos": True}


def raw_logits(text: list[int]) -> np.ndarray:
    """Of the token after each token of the text."""
    return tiny.forward(tiny.TENSORS, tiny.CONFIG, text)


def values(triples: list[tuple[float, int, str | None]]) -> np.ndarray:
    return np.asarray([logprob for logprob, *_ in triples])


def assert_close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, float), wanted, atol=2e-4, rtol=2e-4)


@pytest.fixture(scope="module")
def output(engine: Any) -> dict[str, Any]:
    return engine.generate(
        input_ids=PROMPT,
        sampling_params=PARAMS,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=6,
        token_ids_logprob=GIVEN,
    )


def test_three_measures_of_the_drawn_token(output: dict[str, Any]):
    drawn, meta = output["output_ids"], output["meta_info"]
    logits = raw_logits(PROMPT + drawn)[len(PROMPT) - 1 : -1]
    tempered = logits / PARAMS["temperature"]
    kept = np.where(tempered >= np.sort(tempered)[:, [-12]], tempered, -np.inf)
    at = np.arange(len(drawn)), drawn
    assert [token for _, token, _ in meta["output_token_logprobs"]] == drawn
    assert_close(values(meta["output_token_logprobs"]), tiny.log_softmax(tempered)[at])
    assert_close(meta["output_token_raw_logprobs"], tiny.log_softmax(logits)[at])
    assert_close(meta["output_token_processed_logprobs"], tiny.log_softmax(kept)[at])


@pytest.mark.parametrize("side", ["output", "input"])
def test_most_likely_tokens_and_given_ids(output: dict[str, Any], side: str):
    drawn, meta = output["output_ids"], output["meta_info"]
    logits = raw_logits(PROMPT + drawn)
    tops, given = meta[f"{side}_top_logprobs"], meta[f"{side}_token_ids_logprobs"]
    if side == "output":  # by SGLang's measure: after the temperature, before the filters
        logits = logits[len(PROMPT) - 1 : -1] / PARAMS["temperature"]
    else:
        assert tops[0] is None and given[0] is None
        tops, given = tops[1:], given[1:]
        logits = logits[: len(PROMPT) - 1]
    log_p = tiny.log_softmax(logits)
    assert len(tops) == len(given) == len(log_p)
    for row, top, some in zip(log_p, tops, given, strict=True):
        order = np.argsort(-row, kind="stable")[:6]
        assert [token for _, token, _ in top] == order.tolist()
        assert_close(values(top), row[order])
        assert [token for _, token, _ in some] == GIVEN
        assert_close(values(some), row[GIVEN])


@pytest.mark.parametrize("start", [0, 1, 2, 17, 39, 40])
def test_prompt_logprobs_from_any_place(engine: Any, start: int):
    """Whatever the prefix cache holds by now."""
    output = engine.generate(
        input_ids=PROMPT,
        sampling_params={"max_new_tokens": 2},
        return_logprob=True,
        logprob_start_len=start,
    )
    log_p = tiny.log_softmax(raw_logits(PROMPT))
    got = output["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in got] == PROMPT[start:]
    if start == 0:
        assert got.pop(0)[0] is None
    first = max(1, start)
    assert_close(values(got), log_p[range(first - 1, 39), PROMPT[first:]])


def test_prompt_logprobs_over_chunks_and_samples(engine: Any):
    """The longest prompt takes three prefills."""
    prompts = tiny.prompts_of(150, 33, 5)
    outputs = engine.generate(
        input_ids=prompts,
        sampling_params={"n": 2, "max_new_tokens": 3, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=[0, 10, -1],
        top_logprobs_num=[0, 2, 2],
    )
    for i, output in enumerate(outputs):
        prompt, meta = prompts[i // 2], output["meta_info"]
        got = meta["input_token_logprobs"]
        assert len(got) == [150, 23, 0][i // 2]
        assert ("input_top_logprobs" in meta) == (i >= 2)
        if got:
            first = 1 if i < 2 else 10
            log_p = tiny.log_softmax(raw_logits(prompt))
            wanted = log_p[range(first - 1, len(prompt) - 1), prompt[first:]]
            assert_close(values(got[-len(wanted) :]), wanted)


def test_streamed_and_whole_are_the_same(engine: Any, output: dict[str, Any]):
    *_, last = engine.generate(
        input_ids=PROMPT,
        sampling_params=PARAMS,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=6,
        token_ids_logprob=GIVEN,
        stream=True,
    )
    for name, wanted in output["meta_info"].items():
        if not name.endswith("_logprobs"):
            continue
        got = last["meta_info"][name]
        if name in ("output_token_raw_logprobs", "output_token_processed_logprobs"):
            assert_close(got, wanted)
        elif name.endswith("token_logprobs"):
            assert [item[1:] for item in got] == [item[1:] for item in wanted]
        else:
            assert [item and [x[1] for x in item] for item in got] == [
                item and [x[1] for x in item] for item in wanted
            ]


def test_no_new_tokens_give_the_logprob_of_one(engine: Any):
    """What `score` reads."""
    output = engine.generate(
        input_ids=OTHER,
        sampling_params={"max_new_tokens": 0, "temperature": 0},
        return_logprob=True,
        token_ids_logprob=GIVEN,
    )
    assert output["output_ids"] == [] and output["meta_info"]["completion_tokens"] == 0
    [given] = output["meta_info"]["output_token_ids_logprobs"]
    assert_close(values(given), tiny.log_softmax(raw_logits(OTHER))[-1, GIVEN])
    assert len(output["meta_info"]["output_token_logprobs"]) == 1


def test_text_stands_in_the_lists_when_asked_for(engine: Any, tokenizer: Any):
    output = engine.generate(
        input_ids=OTHER,
        sampling_params={"max_new_tokens": 3, "ignore_eos": True},
        return_logprob=True,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    meta = output["meta_info"]
    for _, token, text in [*meta["output_token_logprobs"], *meta["output_top_logprobs"][0]]:
        assert text == tokenizer.decode([token])


def test_without_return_logprob_nothing_is_reported(engine: Any):
    output = engine.generate(
        input_ids=OTHER,
        sampling_params={"max_new_tokens": 2},
        top_logprobs_num=3,
        token_ids_logprob=GIVEN,
        logprob_start_len=0,
    )
    assert not [name for name in output["meta_info"] if "logprob" in name]


@pytest.mark.parametrize(
    "call, words",
    [
        ({"top_logprobs_num": 21}, r"`top_logprobs_num` must be an integer in \[0, 20\], got 21"),
        ({"top_logprobs_num": -1}, "`top_logprobs_num`"),
        ({"logprob_start_len": 41}, "`logprob_start_len` .* at most its length, 40"),
        ({"logprob_start_len": "x"}, "`logprob_start_len`"),
        ({"token_ids_logprob": [384]}, "vocabulary"),
        ({"token_ids_logprob": [[5], [6]]}, "2 lists for 1 prompts"),
        ({"token_ids_logprob": list(range(MAX_LOGPROB_IDS + 1))}, "the limit is"),
    ],
)
def test_bad_wishes_are_refused_by_name(engine: Any, call: dict[str, Any], words: str):
    with pytest.raises(RequestError, match=words):
        engine.generate(input_ids=PROMPT, return_logprob=True, **call)
