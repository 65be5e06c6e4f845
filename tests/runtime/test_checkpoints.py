"""Checkpoint files give the arrays they were written from: GGUF of every type, and safetensors."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from jaxengine.config import ModelConfig
from jaxengine.errors import ConfigError, UnsupportedModelError, WeightsError
from jaxengine.locate import read_model_config
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel
from jaxengine.runtime import weights
from jaxengine.runtime.checkpoints import open_checkpoint
from jaxengine.runtime.sharding import make_mesh
from tests.engine import tiny
from tests.gguf_files import own_name, random_q4_k, random_q5_k, random_q6_k, write_gguf
from tests.oracle import params_from_tensors

QWEN2 = dataclasses.replace(tiny.CONFIG, vocab_size=48, intermediate_size=64)
# K-blocks hold 256 values.
LLAMA = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=24,
    hidden_size=256,
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=True,
    max_position_embeddings=512,
    dtype="float32",
    eos_token_ids=(3,),
)


def load(path: Path, config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    family = MODELS[config.architecture]
    parts = family.weight_parts(config)
    target = weights.place(
        BoundModel(family, config, jnp.dtype(dtype)), make_mesh(jax.devices()[:1])
    )
    checkpoint = open_checkpoint(path, parts.keys())
    return weights.load_checkpoint(checkpoint, parts, target, progress=False)


def assert_same(got: dict[str, Any], config: ModelConfig, tensors: tiny.Tensors):
    expected = params_from_tensors(config, tensors)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("config", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize(
    "kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=lambda k: k.name
)
def test_gguf_gives_the_dequantised_tensors(config: ModelConfig, kind: Type, tmp_path: Path):
    tensors = tiny.random_tensors(config)
    path = write_gguf(tmp_path / "model.gguf", config, tensors, kind=kind)
    rounded = {
        # Blocks lie within rows, so llama.cpp's order of the rows does not matter here.
        name: gguf.quants.dequantize(gguf.quants.quantize(tensor, kind), kind)
        if tensor.ndim > 1
        else tensor
        for name, tensor in tensors.items()
    }
    assert_same(load(path, config), config, rounded)


@pytest.mark.parametrize(
    ("kind", "random_blocks"),
    [(Type.Q4_K, random_q4_k), (Type.Q5_K, random_q5_k), (Type.Q6_K, random_q6_k)],
)
def test_gguf_k_blocks_mean_what_their_format_says(kind: Type, random_blocks: Any, tmp_path: Path):
    rng = np.random.default_rng(0)
    tensors = tiny.random_tensors(LLAMA)
    down = "model.layers.0.mlp.down_proj.weight"
    data, tensors[down] = random_blocks(rng, 256, 256)
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors, {down: (data, kind)})
    got = load(path, LLAMA)["layers"][0]["mlp"]["down"]["weight"]
    np.testing.assert_allclose(got, tensors[down], rtol=1e-6, atol=1e-7)


def test_gguf_becomes_the_engines_dtype(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", QWEN2, tiny.random_tensors(QWEN2), kind=Type.Q8_0)
    wide, narrow = load(path, QWEN2), load(path, QWEN2, jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), wide, narrow)


@pytest.mark.parametrize("config", [QWEN2, LLAMA], ids=["qwen2", "llama"])
def test_gguf_config_is_that_of_the_model(config: ModelConfig, tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", config, tiny.random_tensors(config))
    assert read_model_config(path) == config


def test_gguf_of_llama_3_has_its_rope_scaling(tmp_path: Path):
    """The file holds the divisors of the frequencies, of which the config's numbers are found."""
    scaled = MODELS["LlamaForCausalLM"].parse_config(
        {
            **LLAMA_RAW,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        }
    )
    divisors = llama_cpp_divisors(64, 500000.0, factor=8.0, low=1.0, high=4.0, original=8192)
    tensors = tiny.random_tensors(LLAMA)
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors, rope_freqs=divisors)
    assert read_model_config(path).rope_scaling == scaled.rope_scaling
    other = llama_cpp_divisors(64, 500000.0, factor=8.0, low=1.0, high=4.0, original=4096)
    path = write_gguf(tmp_path / "other.gguf", LLAMA, tensors, rope_freqs=other)
    with pytest.raises(UnsupportedModelError, match=r"`rope_freqs.weight` .* Llama 3"):
        read_model_config(path)


LLAMA_RAW = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def llama_cpp_divisors(
    dim: int, base: float, *, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """`LlamaModel.generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py."""
    factors = []
    for i in range(0, dim, 2):
        wavelen = 2 * np.pi * base ** (i / dim)
        if wavelen < original / high:
            factors.append(1.0)
        elif wavelen > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelen - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors)


def test_gguf_metadata_may_scale_the_frequencies(tmp_path: Path):
    extra = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
    }
    tensors = tiny.random_tensors(QWEN2)
    path = write_gguf(tmp_path / "model.gguf", QWEN2, tensors, extra=extra)
    scaling = read_model_config(path).rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor, scaling.original_context_len) == ("yarn", 4.0, 256)


def test_gguf_that_is_not_read_is_refused_by_name(tmp_path: Path):
    tensors = tiny.random_tensors(QWEN2)
    odd = "model.layers.1.mlp.up_proj.weight"
    blocks = gguf.quants.quantize(tensors[odd], Type.Q5_0)
    path = write_gguf(tmp_path / "odd.gguf", QWEN2, tensors, {odd: (blocks, Type.Q5_0)})
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_up\.weight .* Q5_0; supp"):
        load(path, QWEN2)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"`general.architecture` .* 'gemma'"):
        read_model_config(tmp_path / "other.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGML, not GGUF" * 10)
    with pytest.raises(ConfigError, match="is not a GGUF file of version"):
        read_model_config(tmp_path / "broken.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"The header of .*cut\.gguf cannot be read"):
        read_model_config(tmp_path / "cut.gguf")


def test_gguf_tensors_that_do_not_fit_are_named(tmp_path: Path):
    deeper = dataclasses.replace(QWEN2, num_layers=3)
    path = write_gguf(tmp_path / "model.gguf", QWEN2, tiny.random_tensors(QWEN2))
    with pytest.raises(WeightsError, match=r"12 missing: model\.layers\.2\.input_layernorm"):
        load(path, deeper)
    shallow = dataclasses.replace(QWEN2, num_layers=1)
    with pytest.raises(WeightsError, match=r"12 unexpected: blk\.1\.attn_k\.bias"):
        load(path, shallow)
    assert own_name("model.layers.1.self_attn.k_proj.bias") == "blk.1.attn_k.bias"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_the_remedy(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(WeightsError, match=rf"{name}, which is pickled code.*save_pretrained"):
        open_checkpoint(tmp_path, ())


def test_a_folder_of_gguf_files_is_told_to_name_one(tmp_path: Path):
    (tmp_path / "model-q8_0.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no config\.json.*Pass .*model-q8_0\.gguf itself"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_checkpoint_may_carry_its_output_projection(is_tied: bool, tmp_path: Path):
    config = dataclasses.replace(tiny.CONFIG, tie_word_embeddings=is_tied)
    tiny.write_checkpoint(tmp_path, tiny.TENSORS)
    assert_same(load(tmp_path, config), config, tiny.TENSORS)
