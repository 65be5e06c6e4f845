"""Every preset of `configs/` is an EngineConfig, and settings are checked when they are made."""

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxengine.bench.shapes import SHAPES
from jaxengine.config import EngineConfig
from jaxengine.defaults import default_params, with_defaults
from jaxengine.errors import CapacityError, ConfigError
from jaxengine.limits import settle
from jaxengine.locate import read_model_config
from jaxengine.models import MODELS
from jaxengine.params import ParamsParser, SamplingParams
from jaxengine.sampling import default_sampler
from jaxengine.text.tokenizer import set_chat_template

PRESETS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
GPU_GB = re.compile(r"one GPU of (\d+) GB")
XLA_SHARE = 0.75  # of a GPU's memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_loads(path: Path):
    config = EngineConfig.from_toml(path)
    assert config.ignored == ()
    assert config != EngineConfig()
    assert EngineConfig.from_kwargs(config.settings()) == config


def settle_on(
    gpu_gb: int, preset: Path, shape: Mapping[str, Any] | None = None, **settings: Any
) -> Any:
    """The limits of a preset on an empty GPU, and the bytes of its weights."""
    config = EngineConfig.from_kwargs({**EngineConfig.from_toml(preset).settings(), **settings})
    raw = {**SHAPES[preset.stem], **(shape or {})}
    family = MODELS[raw["architectures"][0]]
    model = family.parse_config(raw)
    weight_bytes = sum(2 * math.prod(p.shape) for p in family.weight_parts(model).values())
    memory = {"bytes_limit": int(gpu_gb * 1e9 * XLA_SHARE), "bytes_in_use": 0}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: memory)
    return settle(config, model, 2048 + 64, weight_bytes, device), weight_bytes


@pytest.mark.parametrize("path", [p for p in PRESETS if "qwen2.5" in p.stem], ids=lambda p: p.stem)
def test_qwen2_preset_fits_the_gpu_it_names(path: Path):
    [gpu_gb] = map(int, GPU_GB.findall(path.read_text()))
    limits, weight_bytes = settle_on(gpu_gb, path)
    assert f"{weight_bytes / 1e9:.1f} GB of weights" in path.read_text()
    assert limits.max_total_tokens >= 2 * limits.buckets.prefill_tokens[-1]


def test_what_does_not_fit_says_by_how_much():
    [path] = [p for p in PRESETS if p.stem == "qwen2.5-32b"]
    with pytest.raises(CapacityError) as caught:
        settle_on(80, path)
    message = str(caught.value)
    for words in (
        "66.09 GB are needed (65.53 GB for the weights, 0.02 GB for 64 sequences' state, "
        "0.54 GB for KV pages of 2,048 tokens)",
        "there are 51.00 GB: 85% of the 60.00 GB that JAX may use, less 0.00 GB in use",
        "raise `mem_fraction_static`",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
    ):
        assert words in message
    # The remedy of its file: the same GPU with 0.95 of it for JAX.
    limits, _ = settle_on(round(80 * 0.95 / XLA_SHARE), path, mem_fraction_static=0.93)
    assert limits.max_total_tokens > 4096


def test_context_beyond_the_models_is_refused(caplog: pytest.LogCaptureFixture):
    [path] = [p for p in PRESETS if p.stem == "qwen2.5-0.5b"]
    with pytest.raises(ConfigError, match="`context_length` 40,000 exceeds the model's 32,768"):
        settle_on(24, path, context_length=40_000)
    window = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}
    limits, _ = settle_on(24, path, window)
    assert limits.context_length == 4096
    assert "limited to 4,096 tokens: the model's attention slides a window" in caplog.text
    with pytest.raises(ConfigError, match="exceeds the model's sliding attention window of 4,096"):
        settle_on(24, path, window, context_length=5000)


def test_pool_that_does_not_fit_says_by_how_much():
    [path] = [p for p in PRESETS if p.stem == "qwen2.5-0.5b"]
    assert settle_on(24, path, max_total_tokens=1_000_000)[0].max_total_tokens == 1_000_000
    with pytest.raises(CapacityError, match=r"KV pages of 2,000,000 tokens\).*lower `max_total_"):
        settle_on(24, path, max_total_tokens=2_000_000)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"page_size": 0}, "`page_size` must be a positive integer, got 0"),
        ({"max_total_tokens": True}, "`max_total_tokens` must be a positive integer"),
        ({"mem_fraction_static": 1.5}, r"`mem_fraction_static` must be a number in \(0, 1\), got"),
        ({"mem_fraction_static": "0.9"}, "`mem_fraction_static` must be a number"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"decode_buckets": [4, 2]}, "`decode_buckets` must be ascending"),
        ({"prefill_buckets": 64}, "`prefill_buckets` must be ascending positive sizes, got 64"),
        ({"hidden_layers": 3}, "`hidden_layers` must be numbers of layers, got 3"),
        ({"random_seed": "7"}, "`random_seed` must be an integer, 0 or more, got '7'"),
        ({"chunked_prefill_size": -2}, "`chunked_prefill_size` must be a positive integer or -1"),
    ],
)
def test_bad_setting_is_named(setting: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    # Without the type checks that the tests put on every function.
    monkeypatch.setattr(EngineConfig, "__init__", inspect.unwrap(EngineConfig.__init__))
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_kwargs(setting)


def test_overrides_merge_into_the_models_config(tmp_path: Path):
    raw = {**SHAPES["tiny"], "rope_scaling": {"type": "linear", "factor": 2.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    overrides = {"rope_scaling": {"factor": 4.0}, "rms_norm_eps": 1e-5}
    for given in (overrides, json.dumps(overrides)):
        config = EngineConfig.from_kwargs({"json_model_override_args": given})
        model = read_model_config(tmp_path, config.model_overrides)
        assert model.rope_scaling is not None
        assert (model.rope_scaling.kind, model.rope_scaling.factor) == ("linear", 4.0)
        assert (model.rms_norm_eps, model.max_position_embeddings) == (1e-5, 1024)
    with pytest.raises(ConfigError, match="`json_model_override_args` is no JSON"):
        EngineConfig.from_kwargs({"json_model_override_args": "{"})
    with pytest.raises(ConfigError, match="`json_model_override_args` must be a dict or a JSON"):
        EngineConfig.from_kwargs({"json_model_override_args": "[]"})


GENERATION_CONFIG = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.8, "x": None}
SPECS = default_sampler().params


def defaults_of(tmp_path: Path, **settings: Any) -> dict[str, Any]:
    (tmp_path / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    config = EngineConfig.from_kwargs({"model_path": str(tmp_path), **settings})
    return default_params(config, ParamsParser(SPECS, vocab_size=10, tokenizer=object()))


def test_generation_config_counts_only_where_it_is_asked_for(tmp_path: Path):
    assert defaults_of(tmp_path) == {}
    model = {"temperature": 0.7, "top_k": -1, "top_p": 0.8}
    assert defaults_of(tmp_path, sampling_defaults="model") == model
    preferred = defaults_of(
        tmp_path, sampling_defaults="model", preferred_sampling_params='{"top_p": 0.5, "n": 2}'
    )
    assert preferred == {**model, "top_p": 0.5, "n": 2}


def test_preferred_parameters_are_checked_at_once(tmp_path: Path):
    with pytest.raises(ConfigError, match="own sampling parameters: `top_p` must be"):
        defaults_of(tmp_path, preferred_sampling_params={"top_p": 2})
    with pytest.raises(TypeError, match="`topp`; did you mean `top_p`"):
        defaults_of(tmp_path, preferred_sampling_params={"topp": 0.5})


def test_a_request_is_over_the_engines_defaults():
    defaults = {"top_p": 0.5, "n": 2}
    assert with_defaults(None, defaults, SPECS) == defaults
    assert with_defaults({"n": 3}, defaults, SPECS) == {"top_p": 0.5, "n": 3}
    assert with_defaults([{}, None, {"n": 1}], defaults, SPECS)[2] == {"top_p": 0.5, "n": 1}
    # A sampler of the call's own has no `top_p`, so it is not asked for one.
    assert with_defaults({}, defaults, {}) == {"n": 2}
    whole = SamplingParams(temperature=0)
    assert with_defaults(whole, defaults, SPECS) is whole
    assert with_defaults("greedy", defaults, SPECS) == "greedy"


def test_chat_template_is_text_a_file_or_one_by_name(tmp_path: Path):
    def templates_of(*chosen: str | None) -> Any:
        tokenizer = SimpleNamespace(chat_template={"default": "{{ a }}", "tool_use": "{{ b }}"})
        set_chat_template(tokenizer, *chosen)
        return tokenizer.chat_template

    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert templates_of("{{ x }}", None) == "{{ x }}"
    assert templates_of(str(tmp_path / "chat.jinja"), None) == "{{ messages }}"
    assert templates_of(None, "tool_use") == "{{ b }}"
    assert isinstance(templates_of(None, None), dict)
    with pytest.raises(ConfigError, match="`chat_template` 'chatml' is neither"):
        templates_of("chatml", None)
    with pytest.raises(ConfigError, match="'rag' is not there; it has default, tool_use"):
        templates_of(None, "rag")
