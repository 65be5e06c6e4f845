"""Sampling parameters: what is accepted, how it is refused, and seeds."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.errors import RequestError
from jaxengine.params import (
    ParamsParser,
    ParsedParams,
    SamplingParams,
    derive_seed,
    fresh_seed,
)
from jaxengine.types import Param


def in_range(low, high, clause):
    return lambda value: None if low <= value <= high else clause


SPECS = {
    "temperature": Param("float32", 1.0, in_range(0, 1e30, "must be a non-negative finite number")),
    "top_p": Param("float32", 1.0, in_range(1e-9, 1, "must be in (0, 1]")),
    "top_k": Param("int32", -1, lambda v: None if v == -1 or v >= 1 else "must be -1 or >= 1"),
    "logit_bias_ids": Param("int32", (), shape=(4,), pad=-1),
    "logit_bias_values": Param("float32", (), shape=(4,)),
    "strength": Param("float32", 0.25),
}
ENCODED = Param("int32", None, shape=(3,), pad=-1, encode=lambda text, tok: tok.index(text))


class Tokenizer:
    def index(self, text):
        return np.array([int(c) for c in text])


def parse(raw, specs=SPECS, index: int | None = 3, tokenizer: object = Tokenizer()) -> ParsedParams:
    return ParamsParser(specs, vocab_size=100, tokenizer=tokenizer).parse(raw, index)


def test_defaults_are_sglangs():
    params, values = parse(None)
    stated = SamplingParams()
    assert params._asdict() == {name: getattr(stated, name) for name in params._fields}
    assert stated.max_new_tokens == 128 and stated.temperature == 1.0 and stated.top_k == -1
    assert values == {}  # a slot's row begins with the defaults


def test_values_come_back_as_plain_numbers():
    _, values = parse({"temperature": np.float32(0.5), "top_k": np.int64(7), "top_p": 1})
    assert values == {"temperature": 0.5, "top_k": 7, "top_p": 1.0}
    assert [type(values[k]) for k in ("temperature", "top_k", "top_p")] == [float, int, float]


def test_dict_and_dataclass_agree():
    raw = {"temperature": 0, "top_k": 5, "stop": "x", "max_new_tokens": 9, "seed": 1}
    as_dict, as_object = parse(raw), parse(SamplingParams(**raw))
    assert as_dict.params == as_object.params
    for name, value in as_dict.values.items():
        np.testing.assert_array_equal(value, as_object.values[name])


def test_none_is_the_default_but_lifts_the_token_limit():
    params, values = parse({"temperature": None, "stop": None, "n": None, "max_new_tokens": None})
    assert (values, params.stop, params.n) == ({}, (), 1)
    assert params.max_new_tokens is None
    assert parse({"max_new_tokens": None, "min_new_tokens": 500}).params.min_new_tokens == 500


def test_parameters_of_the_sampler_are_keys():
    assert parse({"strength": 2}).values["strength"] == 2.0
    assert parse(SamplingParams(custom={"strength": 2})).values["strength"] == 2.0
    assert parse({"custom": {"strength": 2}}).values["strength"] == 2.0


def test_encoded_parameters_are_padded():
    specs = {"words": ENCODED}
    assert parse({"words": "12"}, specs).values["words"].tolist() == [1, 2, -1]
    for text, clause in (("1234", "shape of at most"), ("ab", "is not usable")):
        with pytest.raises(RequestError, match=f"`words` of prompt 3.*{clause}"):
            parse({"words": text}, specs)


def test_a_sampler_without_a_standard_parameter_refuses_only_changes_of_it():
    specs = {"temperature": SPECS["temperature"]}
    assert parse(SamplingParams(temperature=0.5), specs).values == {"temperature": 0.5}
    for raw in ({"top_k": 5}, SamplingParams(top_k=5), {"logit_bias": {1: 1.0}}):
        with pytest.raises(TypeError, match="is not a parameter of this engine's sampler"):
            parse(raw, specs)


def test_stops_are_normalised():
    params, _ = parse({"stop": ["b", "a", "b"], "stop_token_ids": [5, None, np.int32(3), 5]})
    assert params.stop == ("b", "a")
    assert params.stop_token_ids == (5, 3)


def test_logit_bias_takes_ids_and_their_strings():
    _, values = parse({"logit_bias": {"7": 1, 8: -2.5}})
    assert values["logit_bias_ids"].tolist() == [7, 8, -1, -1]
    assert values["logit_bias_values"].tolist() == [1.0, -2.5, 0.0, 0.0]


BAD_VALUES = [
    (
        {"temperature": -1},
        "`temperature` of prompt 3 must be a non-negative finite number, got -1.",
    ),
    ({"temperature": float("inf")}, "`temperature` of prompt 3 must be a non-negative finite"),
    ({"temperature": float("nan")}, "`temperature` of prompt 3 must be a non-negative finite"),
    ({"temperature": "0.5"}, "`temperature` of prompt 3 must be a number, got '0.5' (str)."),
    ({"temperature": True}, "`temperature` of prompt 3 must be a number, got True."),
    ({"temperature": [0.5]}, "`temperature` of prompt 3 must be a number, got [0.5] (list)."),
    ({"temperature": 10**400}, "must fit into float32"),
    ({"top_p": 0}, "`top_p` of prompt 3 must be in (0, 1], got 0."),
    ({"top_k": 0}, "`top_k` of prompt 3 must be -1 or >= 1, got 0."),
    ({"top_k": 5.0}, "`top_k` of prompt 3 must be an integer, got 5.0."),
    ({"top_k": 1 << 40}, "`top_k` of prompt 3 must fit into int32"),
    ({"max_new_tokens": -1}, "`max_new_tokens` of prompt 3 must be an integer of at least 0"),
    ({"max_new_tokens": 2.0}, "`max_new_tokens` of prompt 3 must be an integer"),
    ({"min_new_tokens": 129}, "`min_new_tokens` of prompt 3 must be in [0, max_new_tokens (128)]"),
    ({"n": 0}, "`n` of prompt 3 must be an integer of at least 1, got 0."),
    ({"n": True}, "`n` of prompt 3 must be an integer of at least 1, got True."),
    ({"seed": -1}, "`seed` of prompt 3 must be an integer in [0, 2**63), got -1."),
    ({"sampling_seed": 2**63}, "`sampling_seed` of prompt 3 must be an integer in [0, 2**63)"),
    ({"seed": 1, "sampling_seed": 2}, "`seed` and `sampling_seed` of prompt 3"),
    ({"stop": ""}, "`stop` of prompt 3 must be a string or a list of strings, none of them empty"),
    ({"stop": ["a", ""]}, "none of them empty"),
    ({"stop": [1]}, "`stop` of prompt 3 must be a string or a list"),
    ({"stop_token_ids": 5}, "must be a list of token ids in [0, 100), got 5."),
    ({"stop_token_ids": [100]}, "must be a list of token ids in [0, 100)"),
    ({"stop_token_ids": [1] * 65}, "must have at most 64 entries, has 65"),
    ({"ignore_eos": 1}, "`ignore_eos` of prompt 3 must be True or False, got 1."),
    ({"logit_bias": [1]}, "`logit_bias` of prompt 3 must map token ids in [0, 100)"),
    ({"logit_bias": {"x": 1}}, "key 'x' is none"),
    ({"logit_bias": {100: 1}}, "key 100 is none"),
    ({"logit_bias": {-1: 1}}, "key -1 is none"),
    ({"logit_bias": {1: float("inf")}}, "inf is none"),
    ({"logit_bias": dict.fromkeys(range(5), 1)}, "must have at most 4 entries, has 5"),
    ({"strength": 1, "custom": {"strength": 1}}, "`strength` of prompt 3 is given twice"),
    ({"custom": 5}, "`custom` of prompt 3 must be a dict"),
    ("top_k", "`sampling_params` of prompt 3 must be a dict or SamplingParams, got 'top_k' (str)."),
]


@pytest.mark.parametrize("raw, message", BAD_VALUES, ids=[str(raw)[:40] for raw, _ in BAD_VALUES])
def test_bad_values_are_named(raw, message: str):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        parse(raw)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "raw, message",
    [
        ({"temperature": "0.5"}, "must be a non-negative finite number, got '0.5' (str)."),
        ({"top_p": True}, "must be a number in (0, 1], got True."),
        ({"top_k": 0}, "must be -1 (off) or an integer of at least 1, got 0."),
        ({"top_k": 2.5}, "must be -1 (off) or an integer of at least 1, got 2.5."),
        ({"repetition_penalty": 0}, "must be a number in (0, 2], got 0."),
        ({"logit_bias": dict.fromkeys(range(257), 1)}, "must have at most 256 entries, has 257"),
    ],
)
def test_the_default_sampler_states_its_ranges(raw, message: str):
    from jaxengine.sampling.sampler import default_sampler

    with pytest.raises(RequestError, match=re.escape(message)):
        ParamsParser(default_sampler().params, vocab_size=1000, tokenizer=None).parse(raw, 0)


def test_a_bare_prompt_has_no_index_in_messages():
    with pytest.raises(ValueError, match=re.escape("`n` must be an integer of at least 1")):
        parse({"n": 0}, index=None)


@pytest.mark.parametrize(
    "name, near",
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("strenght", "strength")],
)
def test_unknown_names_are_type_errors_with_the_nearest(name: str, near: str):
    with pytest.raises(TypeError, match=f"`{name}` of prompt 3; did you mean `{near}`\\?"):
        parse({name: 1})


def test_the_arrays_behind_logit_bias_are_no_keys():
    with pytest.raises(TypeError, match="Unknown sampling parameter"):
        parse({"logit_bias_ids": [1]})


def test_without_a_tokenizer_text_stops_are_refused():
    assert parse({"stop": [], "min_new_tokens": 0}, tokenizer=None).params.stop == ()
    for raw in ({"stop": "x"}, {"min_new_tokens": 1}):
        with pytest.raises(RequestError, match="unavailable when skip_tokenizer_init=True"):
            parse(raw, tokenizer=None)


SEEDS = st.integers(0, 2**63 - 1)


@given(seed=SEEDS, key=st.integers(0, 9) | st.text(max_size=3), sample=st.integers(0, 9))
def test_derived_seeds_are_pure_and_in_range(seed: int, key: int | str, sample: int):
    derived = derive_seed(seed, key, sample)
    assert 0 <= derived < 2**63
    assert derived == derive_seed(seed, key, sample)
    assert (derived == seed) == (key == 0 and sample == 0)


def test_derived_seeds_differ():
    keys = [*range(50), *map(str, range(50))]
    seeds = {derive_seed(s, k, n) for s in (0, 1) for k in keys for n in range(5)}
    assert len(seeds) == 2 * 100 * 5
    assert derive_seed(7, 1, 0) == 799008266652571038  # other releases must replay the same


def test_fresh_seeds_differ():
    seeds = {fresh_seed() for _ in range(100)}
    assert len(seeds) == 100 and all(0 <= seed < 2**63 for seed in seeds)
