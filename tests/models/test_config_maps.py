"""`config.json` of published models, as the families read it, and what they refuse."""

from typing import Any

import pytest

from jaxengine.config import ModelConfig
from jaxengine.errors import UnsupportedModelError
from jaxengine.models import MODELS

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
}


def parse(architecture: str, **values: Any) -> ModelConfig:
    raw = {"architectures": [architecture], **SIZES, **values}
    return MODELS[architecture].parse_config(raw)


def test_families_differ_in_their_flags():
    flags = {name: (c.qkv_bias, c.qk_norm) for name in MODELS for c in [parse(name)]}
    assert flags == {
        "LlamaForCausalLM": (False, False),
        "MistralForCausalLM": (False, False),
        "Qwen2ForCausalLM": (True, False),
        "Qwen3ForCausalLM": (False, True),
    }


def test_head_size_is_the_configs_own():
    assert parse("LlamaForCausalLM").head_dim == 128
    assert parse("MistralForCausalLM", head_dim=160).head_dim == 160
    # Qwen3's is 128 where its config is silent, whatever the other sizes are.
    assert parse("Qwen3ForCausalLM", num_attention_heads=64).head_dim == 128


@pytest.mark.parametrize(
    ("architecture", "values", "longest"),
    [
        ("MistralForCausalLM", {"sliding_window": 4096}, 4096),
        ("MistralForCausalLM", {"sliding_window": None}, 40960),
        ("MistralForCausalLM", {"sliding_window": 65536}, 40960),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 4096}, 40960),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4096}, 4096),
        (  # no layer from the 36th on: none slides
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 36},
            40960,
        ),
        (
            "Qwen3ForCausalLM",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 2048},
            2048,
        ),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention"], "sliding_window": 2048}, 40960),
    ],
)
def test_sliding_window_limits_the_context(architecture: str, values: dict, longest: int):
    config = parse(architecture, **values)
    assert config.max_position_embeddings == longest
    assert longest == min(config.sliding_window or 40960, 40960)


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        ({"type": "yarn", "factor": 4.0}, 4 * 40960),
        ({"type": "linear", "factor": 2.0}, 2 * 40960),
        ({"type": "dynamic", "factor": 2.0}, 40960),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 40960),
    ],
)
def test_scaling_stretches_the_context(scaling: dict, longest: int):
    config = parse("Qwen2ForCausalLM", rope_scaling=scaling)
    assert config.max_position_embeddings == longest


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("LlamaForCausalLM", "hidden_act", "gelu"),
        ("LlamaForCausalLM", "attention_bias", True),
        ("LlamaForCausalLM", "mlp_bias", True),
        ("LlamaForCausalLM", "pretraining_tp", 2),
        ("Qwen3ForCausalLM", "attention_bias", True),
        ("Qwen3ForCausalLM", "layer_types", ["chunked_attention"]),
        ("Qwen2ForCausalLM", "quantization_config", {"quant_method": "gptq"}),
        ("Qwen2ForCausalLM", "torch_dtype", "float64"),
    ],
)
def test_what_is_not_supported_is_named(architecture: str, field: str, value: Any):
    with pytest.raises(UnsupportedModelError, match=f"`{field}` .*; supported: "):
        parse(architecture, **{field: value})
