"""Every name of SGLang is in the table, and meets the fate that the table says."""

import ast
import dataclasses
import inspect
import logging
import pydoc
from pathlib import Path
from typing import Any

import pytest

from jaxengine import Engine
from jaxengine.compat import (
    GENERATE_ARGUMENTS,
    METHODS,
    SAMPLING_PARAMETERS,
    Name,
)
from jaxengine.config import EngineConfig
from jaxengine.engine_arguments import ENGINE_ARGUMENTS
from jaxengine.errors import ConfigError, RequestError
from jaxengine.generate_arguments import DEFAULTS
from jaxengine.params import ParamsParser, SamplingParams
from jaxengine.requests import _warn_once, parse_call
from jaxengine.types import Param

FIELDS = {f.name for f in dataclasses.fields(EngineConfig)} - {"ignored"}
SPECS = {
    **{name: Param("float32", 1.0) for name in ("temperature", "top_p", "repetition_penalty")},
    **{name: Param("float32", 0.0) for name in ("min_p", "frequency_penalty", "presence_penalty")},
    "top_k": Param("int32", -1),
    "logit_bias_ids": Param("int32", None, shape=(4,), pad=-1),
    "logit_bias_values": Param("float32", None, shape=(4,)),
}

with (Path(__file__).parent / "golden" / "sglang_server_args.txt").open() as file:
    LINES = [line.rstrip("\n").split("=", 1) for line in file if not line.startswith("#")]
    SGLANG_RUN = {name: ast.literal_eval(value) for name, value in LINES}
"""A run of SGLang: all of its engine's arguments, and their values."""


def with_fate(table: Any, fate: str) -> list[str]:
    return sorted(name for name, known in table.items() if known.fate == fate)


def test_all_of_sglangs_arguments_are_known():
    assert len(SGLANG_RUN) == 343
    assert SGLANG_RUN.keys() <= ENGINE_ARGUMENTS.keys()


def test_the_arguments_of_a_run_of_sglang_move_over():
    """But for its page of one token, none of what it printed stands in the way."""
    config = EngineConfig.from_kwargs(SGLANG_RUN)
    assert config.model_path == "qwen/qwen2.5-0.5b-instruct"
    assert config.chunked_prefill_size == 8192


def test_every_ignored_and_refused_name_says_why():
    for table in (ENGINE_ARGUMENTS, GENERATE_ARGUMENTS, SAMPLING_PARAMETERS, METHODS):
        for name, known in table.items():
            assert bool(known.why) == (known.fate in ("ignored", "refused")), name
            assert bool(known.target) == (known.fate == "mapped"), name
            assert not known.why.endswith("."), name


def test_honoured_arguments_are_settings():
    assert set(with_fate(ENGINE_ARGUMENTS, "honoured")) == FIELDS & ENGINE_ARGUMENTS.keys()


@pytest.mark.parametrize("name", with_fate(ENGINE_ARGUMENTS, "mapped"))
def test_mapped_arguments_set_ours(name: str):
    target = ENGINE_ARGUMENTS[name].target
    value = not getattr(EngineConfig(), target)
    assert getattr(EngineConfig.from_kwargs({name: value}), target) == value
    with pytest.raises(ConfigError, match=f"`{target}` is given under two names"):
        EngineConfig.from_kwargs({name: value, target: not value})


def test_ignored_arguments_change_nothing_and_warn_once(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="jaxengine")
    for name in with_fate(ENGINE_ARGUMENTS, "ignored"):
        caplog.clear()
        config = EngineConfig.from_kwargs({name: "anything"})
        assert config == dataclasses.replace(EngineConfig(), ignored=(name,))
        assert caplog.messages == [f"`{name}` is ignored: {ENGINE_ARGUMENTS[name].why}."]


def test_refused_arguments_are_refused_unless_they_ask_for_nothing(
    caplog: pytest.LogCaptureFixture,
):
    for name in with_fate(ENGINE_ARGUMENTS, "refused"):
        known = ENGINE_ARGUMENTS[name]
        for off in (None, False, 0, "", [], {}, known.off):
            assert EngineConfig.from_kwargs({name: off}).ignored == (name,)
        for value in (True, 2, "something", ["x"], {"a": 1}):
            with pytest.raises(ConfigError, match=f"`{name}` is not supported: ") as caught:
                EngineConfig.from_kwargs({name: value})
            assert known.why in str(caught.value)
    assert not caplog.messages


def call(**arguments: Any) -> Any:
    return parse_call(
        {"input_ids": [1, 2], **arguments},
        parser=ParamsParser(SPECS, vocab_size=10, tokenizer=object()),
        hidden_size=8,
        max_top_logprobs=5,
    )


def test_honoured_arguments_of_generate_are_in_its_signature():
    honoured = set(with_fate(GENERATE_ARGUMENTS, "honoured"))
    for method in (Engine.generate, Engine.async_generate):
        named = inspect.signature(method).parameters.keys()
        assert named & GENERATE_ARGUMENTS.keys() == honoured
    positional = list(inspect.signature(Engine.generate).parameters)[1:4]
    assert positional == ["prompt", "sampling_params", "input_ids"]


@pytest.mark.parametrize("method", ["generate", "async_generate"])
def test_arguments_of_generate_are_listed_and_explained(method: str):
    """`help` and a notebook's tooltip show each, though they are written down once."""
    parameters = dict(inspect.signature(getattr(Engine, method)).parameters)
    assert parameters.pop("self") and parameters.pop("others")
    assert {name: p.default for name, p in parameters.items()} == DEFAULTS
    shown = pydoc.plain(pydoc.render_doc(Engine.generate))
    for name in DEFAULTS:
        assert f"\n      {name}: " in shown, f"`{name}` is not explained"


def test_settings_are_listed_in_the_engines_signature():
    parameters = inspect.signature(Engine).parameters
    defaults = {name: getattr(EngineConfig(), name) for name in FIELDS}
    assert {name: parameters[name].default for name in FIELDS} == defaults
    explained = inspect.getdoc(EngineConfig) or ""
    assert [name for name in FIELDS if f"\n  {name}: " not in explained] == []


def test_ignored_arguments_of_generate_warn(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="jaxengine")
    for name in with_fate(GENERATE_ARGUMENTS, "ignored"):
        caplog.clear()
        _warn_once.cache_clear()  # once a process
        call(**{name: "anything"})
        call(**{name: "anything"})
        assert caplog.messages == [f"`{name}` is ignored: {GENERATE_ARGUMENTS[name].why}."]


def assert_refused(known: Name, name: str, ask: Any) -> None:
    for off in (None, False, 0, "", [], {}, [None]):
        ask(**{name: off})
    for value in (True, 2, "something", ["x"], {"a": 1}):
        with pytest.raises(RequestError, match=f"`{name}`.* is not supported: ") as caught:
            ask(**{name: value})
        assert known.why in str(caught.value)


@pytest.mark.parametrize("name", with_fate(GENERATE_ARGUMENTS, "refused"))
def test_refused_arguments_of_generate(name: str):
    assert_refused(GENERATE_ARGUMENTS[name], name, call)


def sampling(**params: Any) -> dict[str, Any]:
    """What is made of sampling parameters, the host's and the sampler's, by name."""
    parsed = ParamsParser(SPECS, vocab_size=10, tokenizer=object()).parse(params, None)
    return {**parsed.params._asdict(), **parsed.values}


VALUES = {
    "logit_bias": {"3": 1.0},
    "max_new_tokens": 7,
    "min_new_tokens": 2,
    "n": 3,
    "stop": ("x",),
    "stop_regex": ("x+",),
    "stop_token_ids": (4,),
    "stream_interval": 3,
    "top_k": 5,
}


@pytest.mark.parametrize("name", with_fate(SAMPLING_PARAMETERS, "honoured"))
def test_honoured_sampling_parameters_arrive(name: str):
    default = getattr(SamplingParams(), name)
    value = VALUES.get(name, (not default) if isinstance(default, bool) else 0.5)
    got = sampling(**{name: value})
    if name == "logit_bias":
        assert (got["logit_bias_ids"][0], got["logit_bias_values"][0]) == (3, 1.0)
        return
    assert got[name] == value != default


@pytest.mark.parametrize("name", with_fate(SAMPLING_PARAMETERS, "mapped"))
def test_mapped_sampling_parameters_arrive_as_ours(name: str):
    target = SAMPLING_PARAMETERS[name].target
    value = {"top_p": 0.5} if target == "custom" else 11
    got = sampling(**{name: value})
    assert got["top_p"] == 0.5 if target == "custom" else got[target] == 11


@pytest.mark.parametrize("name", with_fate(SAMPLING_PARAMETERS, "refused"))
def test_refused_sampling_parameters(name: str):
    assert_refused(SAMPLING_PARAMETERS[name], name, sampling)


def test_sampling_parameters_beside_sglangs_are_ours():
    ours = {f.name for f in dataclasses.fields(SamplingParams)} - SAMPLING_PARAMETERS.keys()
    assert ours == {"custom", "seed", "seed_mode"}


def test_honoured_methods_are_there():
    assert [name for name in with_fate(METHODS, "honoured") if name not in dir(Engine)] == []


def test_mapped_methods_are_ours():
    engine = object.__new__(Engine)
    vars(engine).update({METHODS[name].target: name for name in with_fate(METHODS, "mapped")})
    for name in with_fate(METHODS, "mapped"):
        assert name not in dir(Engine)
        assert getattr(engine, name) == name


def test_refused_methods_say_why():
    engine = object.__new__(Engine)
    for name in with_fate(METHODS, "refused"):
        with pytest.raises(AttributeError, match=f"`Engine.{name}` is not supported: ") as caught:
            getattr(engine, name)
        assert METHODS[name].why in str(caught.value)
    with pytest.raises(AttributeError, match="no attribute `genrate`; did you mean `generate`"):
        engine.genrate()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("name", "near"), [("tp_sise", "tp_size"), ("max_runing_requests", "max_running_requests")]
)
def test_unknown_arguments_name_the_nearest(name: str, near: str):
    with pytest.raises(TypeError, match=f"`{name}`; did you mean `{near}`"):
        EngineConfig.from_kwargs({name: 1})
    with pytest.raises(TypeError, match="`image_dta`; did you mean `image_data`"):
        call(image_dta=1)
