"""The arguments of `generate`: shapes, and every way to get them wrong."""

import re

import numpy as np
import pytest

from jaxengine.errors import RequestError
from jaxengine.params import SamplingParams
from jaxengine.requests import ParsedCall, parse_call
from jaxengine.types import Param

SPECS = {"temperature": Param("float32", 1.0)}


def call(prompt=None, sampling_params=None, input_ids=None, **others) -> ParsedCall:
    named = {name: others.pop(name) for name in ("return_logprob", "rid") if name in others}
    tokenizer = others.pop("tokenizer", object())
    return parse_call(
        prompt,
        sampling_params,
        input_ids,
        **named,
        others=others,
        specs=SPECS,
        vocab_size=10,
        hidden_size=4,
        max_top_logprobs=5,
        tokenizer=tokenizer,
    )


def test_a_bare_prompt_is_single_and_a_list_of_one_is_not():
    assert call("a").is_single and call(input_ids=[1, 2]).is_single
    assert not call(["a"]).is_single and not call(input_ids=[[1, 2]]).is_single
    assert not call("a", {"n": 2}).is_single and call("a", {"n": 2}).n == 2
    assert call([]).requests == [] and call([], []).requests == []


@pytest.mark.parametrize(
    "input_ids",
    [
        [[1, 2], [3, 4]],
        ((1, 2), (3, 4)),
        np.array([[1, 2], [3, 4]]),
        [np.array([1, 2], np.uint8), np.array([3, 4])],
        [[np.int64(1), 2], [3, 4]],
    ],
)
def test_ids_may_be_lists_and_arrays(input_ids):
    requests = call(input_ids=input_ids).requests
    assert [r.input_ids.tolist() for r in requests if r.input_ids is not None] == [[1, 2], [3, 4]]
    assert all(r.input_ids is not None and r.input_ids.dtype == np.int32 for r in requests)
    assert [r.text for r in requests] == [None, None]


def test_one_dimensional_array_is_one_prompt():
    assert call(input_ids=np.arange(3)).is_single


def test_sampling_params_spread_over_a_list_or_go_one_to_one():
    requests = call(["a", "b"], {"temperature": 0}).requests
    assert [r.values["temperature"] for r in requests] == [0.0, 0.0]
    requests = call(["a", "b"], [{"temperature": 0}, None]).requests
    assert [r.values["temperature"] for r in requests] == [0.0, 1.0]
    assert call("a", SamplingParams(seed=3)).requests[0].params.seed == 3


def test_rids_are_given_or_fresh():
    fresh = [r.rid for r in call(["a", "b"]).requests]
    assert len(set(fresh)) == 2 and all(len(rid) == 32 for rid in fresh)
    assert call("a", rid="x").requests[0].rid == "x"
    assert [r.rid for r in call(["a", "b"], rid="x").requests] == ["x_0", "x_1"]
    assert [r.rid for r in call(["a", "b"], rid=["p", "q"]).requests] == ["p", "q"]


def test_logprob_flags_spread():
    assert [r.return_logprob for r in call(["a", "b"], return_logprob=True).requests] == [True] * 2
    flags = [r.return_logprob for r in call(["a", "b"], return_logprob=[True, False]).requests]
    assert flags == [True, False]


BAD_CALLS = [
    ({}, "`prompt`, `input_ids` or `input_embeds` must be given."),
    ({"prompt": "a", "input_ids": [1]}, "`prompt` and `input_ids` are both given"),
    ({"prompt": ""}, "`prompt` is empty"),
    ({"prompt": ["a", ""]}, "Prompt 1 is empty"),
    ({"prompt": 5}, "`prompt` must be a string or a list of strings, got int."),
    ({"prompt": [[1, 2]]}, "Prompt 0 must be a string, got list. Token ids go into `input_ids`."),
    ({"prompt": [1, 2]}, "Prompt 0 must be a string, got int. Token ids go into `input_ids`."),
    ({"prompt": ["a", "b\ud800"]}, "Prompt 1 holds half a surrogate pair at character 1"),
    ({"prompt": "a", "tokenizer": None}, "skip_tokenizer_init=True"),
    ({"input_ids": []}, "`input_ids` is empty"),
    ({"input_ids": [[]]}, "`input_ids` of prompt 0 is empty"),
    ({"input_ids": np.zeros((0,))}, "`input_ids` is empty"),
    ({"input_ids": [[1], []]}, "`input_ids` of prompt 1 is empty"),
    ({"input_ids": "abc"}, "`input_ids` must be a list of ids or a list of such lists, got str."),
    ({"input_ids": [[1], "a"]}, "`input_ids` of prompt 1 must be a list of ids, got str."),
    ({"input_ids": [[1], [2, 10]]}, "prompt 1 must be in the vocabulary, [0, 10); got 10 at posi"),
    ({"input_ids": [1, 2, -1]}, "`input_ids` must be in the vocabulary, [0, 10); got -1 at posit"),
    ({"input_ids": [1, 10**30]}, f"[0, 10); got {10**30} at position 1."),
    ({"input_ids": [1, 2.0]}, "`input_ids` must hold integers only, got 2.0 at position 1."),
    ({"input_ids": [1, True]}, "`input_ids` must hold integers only, got True at position 1."),
    ({"input_ids": [1, [2]]}, "`input_ids` must hold integers only, got [2] at position 1."),
    ({"input_ids": np.array([1.5])}, "`input_ids` must be a row of integers, got an array of"),
    ({"input_ids": np.array(5)}, "`input_ids` must be a row of integers, got an array of"),
    ({"input_ids": np.ones((1, 1, 1), int)}, "`input_ids` of prompt 0 must be a row of integers"),
    ({"prompt": ["a"], "sampling_params": [{}, {}]}, "`sampling_params` has 2 entries for 1 prom"),
    ({"prompt": "a", "sampling_params": [{}]}, "`sampling_params` is a list, but there is one"),
    (
        {"prompt": ["a", "b"], "sampling_params": [{}, {"n": 2}]},
        "1 for prompt 0 and 2 for prompt 1",
    ),
    ({"prompt": ["a"], "sampling_params": [{"n": 0}]}, "`n` of prompt 0 must be"),
    ({"prompt": ["a", "b"], "rid": ["x"]}, "`rid` has 1 entries for 2 prompts."),
    ({"prompt": ["a", "b"], "rid": ["x", "x"]}, "`rid` 'x' is given to prompts 0 and 1."),
    ({"prompt": "a", "rid": 5}, "`rid` must be a string that is not empty, got 5."),
    ({"prompt": ["a"], "rid": ""}, "`rid` of prompt 0 must be a string that is not empty"),
    ({"prompt": "a", "return_logprob": 1}, "`return_logprob` must be True or False, got 1."),
    (
        {"prompt": ["a"], "return_logprob": [True] * 2},
        "`return_logprob` has 2 entries for 1 prompts",
    ),
    ({"prompt": "a", "lora_path": "x"}, "`lora_path` is not supported: LoRA"),
    ({"prompt": "a", "image_data": np.ones(3)}, "`image_data` is not supported"),
]


@pytest.mark.parametrize("arguments, message", BAD_CALLS, ids=[str(a)[:50] for a, _ in BAD_CALLS])
def test_bad_calls_are_named(arguments, message: str):
    with pytest.raises(RequestError, match=re.escape(message)):
        call(**arguments)


def test_defaults_of_unsupported_arguments_are_accepted():
    assert call(
        ["a", "b"],
        image_data=None,
        lora_path=[None, None],
        session_params=None,
        priority=None,
    ).requests


@pytest.mark.parametrize(
    "name, message",
    [
        ("promt", "did you mean `prompt`?"),
        ("lora_paths", "did you mean `lora_path`?"),
        ("temperature", "put it into `sampling_params`"),
        ("top_k", "put it into `sampling_params`"),
        ("zzz", "unexpected keyword argument `zzz`."),
    ],
)
def test_unknown_arguments_are_type_errors(name: str, message: str):
    with pytest.raises(TypeError, match=re.escape(message)):
        call("a", **{name: 1})
