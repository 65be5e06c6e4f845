"""The arguments of `generate`: shapes, and every way to get them wrong."""

import re
from typing import Any

import numpy as np
import pytest

from jaxengine.errors import RequestError
from jaxengine.params import ParamsParser, SamplingParams
from jaxengine.requests import ParsedCall, PromptRequest, Refused, parse_call
from jaxengine.types import Param

SPECS = {"temperature": Param("float32", 1.0)}


def call(
    prompt=None, sampling_params=None, input_ids=None, *, tokenizer: Any = "any", **others
) -> ParsedCall:
    asked = {"prompt": prompt, "sampling_params": sampling_params, "input_ids": input_ids}
    return parse_call(
        {**asked, **others},
        parser=ParamsParser(SPECS, vocab_size=10, tokenizer=tokenizer),
        hidden_size=4,
        max_top_logprobs=5,
    )


def prompts_of(*args, **arguments) -> list[PromptRequest]:
    requests = call(*args, **arguments).requests
    prompts = [request for request in requests if isinstance(request, PromptRequest)]
    assert len(prompts) == len(requests)
    return prompts


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
    requests = prompts_of(input_ids=input_ids)
    assert [r.input_ids.tolist() for r in requests if r.input_ids is not None] == [[1, 2], [3, 4]]
    assert all(r.input_ids is not None and r.input_ids.dtype == np.int32 for r in requests)
    assert [r.text for r in requests] == [None, None]


def test_one_dimensional_array_is_one_prompt():
    assert call(input_ids=np.arange(3)).is_single


def test_sampling_params_spread_over_a_list_or_go_one_to_one():
    requests = prompts_of(["a", "b"], {"temperature": 0})
    assert [r.values["temperature"] for r in requests] == [0.0, 0.0]
    requests = prompts_of(["a", "b"], [{"temperature": 0}, None])
    assert [r.values for r in requests] == [{"temperature": 0.0}, {}]
    assert prompts_of("a", SamplingParams(seed=3))[0].params.seed == 3


def test_rids_are_given_or_fresh():
    fresh = [r.rid for r in prompts_of(["a", "b"])]
    assert len(set(fresh)) == 2 and all(len(rid) == 32 for rid in fresh)
    assert prompts_of("a", rid="x")[0].rid == "x"
    assert [r.rid for r in prompts_of(["a", "b"], rid="x")] == ["x_0", "x_1"]
    assert [r.rid for r in prompts_of(["a", "b"], rid=["p", "q"])] == ["p", "q"]


def test_logprob_flags_spread():
    assert [r.return_logprob for r in prompts_of(["a", "b"], return_logprob=True)] == [True] * 2
    flags = [r.return_logprob for r in prompts_of(["a", "b"], return_logprob=[True, False])]
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
    ({"input_ids": [7, False]}, "`input_ids` must hold integers only, got False at position 1."),
    ({"input_ids": [[7], [8, True, 1]]}, "of prompt 1 must hold integers only, got True at posi"),
    ({"input_ids": [7, "8"]}, "`input_ids` must hold integers only, got '8' at position 1."),
    ({"input_ids": np.array([3, -1])}, "[0, 10); got -1 at position 1."),
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
    ({"prompt": "a", "logprob_start_len": -2}, "`logprob_start_len` must be an integer in [-1,"),
    (
        {"prompt": "a", "top_logprobs_num": 6},
        "`top_logprobs_num` must be an integer in [0, 5], got 6",
    ),
    ({"prompt": "a", "token_ids_logprob": [10]}, "`token_ids_logprob` must be in the vocabulary"),
    ({"prompt": ["a", "b"], "priority": [1]}, "`priority` has 1 entries for 2 prompts"),
    ({"prompt": ["a", "b"], "priority": [1, 0.5]}, "`priority` of prompt 1 must be an integer"),
    ({"prompt": "a", "cache_salt": 5}, "`cache_salt` must be a string, got 5"),
    ({"prompt": ["a"], "extra_key": [b"x"]}, "`extra_key` of prompt 0 must be a string"),
    ({"prompt": "a", "timeout_s": 0}, "`timeout_s` must be a positive number of seconds, got 0"),
    ({"prompt": "a", "timeout_s": float("nan")}, "`timeout_s` must be a positive number"),
    ({"prompt": "a", "timeout_s": "5"}, "`timeout_s` must be a positive number"),
    ({"prompt": "a", "on_error": "ignore"}, "`on_error` must be one of raise, return, got"),
    ({"prompt": "a", "image_data": np.ones(3)}, "`image_data` is not supported"),
]


@pytest.mark.parametrize("arguments, message", BAD_CALLS, ids=[str(a)[:50] for a, _ in BAD_CALLS])
def test_bad_calls_are_named(arguments, message: str):
    with pytest.raises(RequestError, match=re.escape(message)):
        call(**arguments)


def test_defaults_of_unsupported_arguments_are_accepted():
    assert prompts_of(
        ["a", "b"],
        image_data=None,
        lora_path=[None, None],
        session_params=None,
        priority=None,
    )


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


def test_prompts_are_refused_alone_where_errors_are_outputs():
    parsed = call(["a", "", "b", 5], on_error="return", rid="x", priority=[1, 2, None, 4])
    assert parsed.returns_errors and parsed.n == 1
    first, empty, third, number = parsed.requests
    assert isinstance(first, PromptRequest) and isinstance(third, PromptRequest)
    assert (first.priority, third.priority) == (1, None)
    assert isinstance(empty, Refused) and empty.rid == "x_1"
    assert "Prompt 1 is empty" in str(empty.error)
    assert isinstance(number, Refused) and "Prompt 3 must be a string" in str(number.error)


def test_what_is_wrong_with_the_call_is_raised_also_where_errors_are_outputs():
    with pytest.raises(RequestError, match="2 entries for 1 prompts"):
        call(["a"], timeout_s=[1, 2], on_error="return")
    with pytest.raises(RequestError, match="`n` must be"):
        call(["a"], {"n": 0}, on_error="return")
    with pytest.raises(TypeError):
        call(["a"], [{"nonsense": 1}], on_error="return")
    # Given once for all prompts.
    with pytest.raises(RequestError, match="`timeout_s` must be a positive number"):
        call(["a", "b"], timeout_s=0, on_error="return")
    one, other = call(["a", "b"], timeout_s=[0, 1], on_error="return").requests
    assert isinstance(one, Refused) and isinstance(other, PromptRequest)


def test_namespace_is_salt_and_key_together():
    def namespaces(**arguments) -> list:
        return [r.cache_namespace for r in prompts_of(["a", "b"], **arguments)]

    assert namespaces() == namespaces(cache_salt="") == [None, None]
    assert namespaces(cache_salt="x") == [("x", None)] * 2
    assert namespaces(cache_salt=["x", None], extra_key="k") == [("x", "k"), (None, "k")]
