"""A tiny random Qwen2, and the slow way to its answers: plain numpy, one request, no cache."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxengine.config import ModelConfig
from jaxengine.models import MODELS
from tests.oracle import params_from_tensors

EOS = 0
CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=384,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qkv_bias=True,
    tie_word_embeddings=False,
    max_position_embeddings=256,
    dtype="float32",
    eos_token_ids=(EOS,),
)

type Tensors = Mapping[str, np.ndarray]


def random_tensors(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """Checkpoint tensors under their Hugging Face names, large enough for texts to vary."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, part in MODELS[config.architecture].weight_parts(config).items():
        noise = rng.standard_normal(part.shape)
        tensors[name] = (1 + 0.1 * noise if "norm" in name else 0.4 * noise).astype(np.float32)
    return tensors


TENSORS = random_tensors()


def engine_arguments(tensors: Tensors = TENSORS) -> dict[str, Any]:
    """Keywords of an Engine over these tensors."""
    return {"params": params_from_tensors(CONFIG, tensors), "model_config": CONFIG}


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random prompts without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 377, length).tolist() for length in lengths]


RAW_CONFIG = {
    "architectures": [CONFIG.architecture],
    "model_type": "qwen2",
    "vocab_size": CONFIG.vocab_size,
    "hidden_size": CONFIG.hidden_size,
    "intermediate_size": CONFIG.intermediate_size,
    "num_hidden_layers": CONFIG.num_layers,
    "num_attention_heads": CONFIG.num_heads,
    "num_key_value_heads": CONFIG.num_kv_heads,
    "head_dim": CONFIG.head_dim,
    "rms_norm_eps": CONFIG.rms_norm_eps,
    "rope_theta": CONFIG.rope_theta,
    "tie_word_embeddings": CONFIG.tie_word_embeddings,
    "max_position_embeddings": CONFIG.max_position_embeddings,
    "torch_dtype": CONFIG.dtype,
    "eos_token_id": EOS,
}


def write_checkpoint(
    folder: Path, tensors: Tensors = TENSORS, *, num_shards: int = 1, tokenizer: Any = None
) -> Path:
    """A checkpoint folder in Hugging Face layout, one file or sharded by an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RAW_CONFIG))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    names = sorted(tensors)
    if num_shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        shard = {name: tensors[name] for name in names[i::num_shards]}
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def forward(tensors: Tensors, config: ModelConfig, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a whole text."""
    final = hidden_states(tensors, config, embeddings(tensors, ids))[-1]
    output = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return (final @ output.T).astype(np.float32)


def embeddings(tensors: Tensors, ids: Sequence[int]) -> np.ndarray:
    return tensors["model.embed_tokens.weight"][np.asarray(ids)]


def hidden_states(tensors: Tensors, config: ModelConfig, embeds: np.ndarray) -> list[np.ndarray]:
    """[T, D] of every layer as transformers counts them, the last of them after the final norm."""
    x = embeds
    half = np.arange(0, config.head_dim, 2) / config.head_dim
    angles = np.outer(np.arange(len(embeds)), config.rope_theta**-half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps)
        return x / scale * tensors[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0)

    def heads(x: np.ndarray, name: str, is_rotated: bool = True) -> np.ndarray:
        y = linear(x, name).reshape(len(embeds), -1, config.head_dim)
        if is_rotated:
            a, b = np.split(y, 2, axis=-1)
            y = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return np.repeat(y, config.num_heads // y.shape[1], axis=1)

    mask = np.triu(np.full((len(embeds), len(embeds)), -np.inf), 1)
    states = []
    for i in range(config.num_layers):
        states.append(x)
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k = heads(h, f"{layer}.self_attn.q_proj"), heads(h, f"{layer}.self_attn.k_proj")
        v = heads(h, f"{layer}.self_attn.v_proj", is_rotated=False)
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(config.head_dim) + mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        attended = np.einsum("nqk,knh->qnh", weights, v).reshape(len(embeds), -1)
        x = x + linear(attended, f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(h, f"{layer}.mlp.gate_proj")
        x = x + linear(
            gate / (1 + np.exp(-gate)) * linear(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj"
        )
    return [*states, norm(x, "model.norm")]


def penalized(
    logits: np.ndarray,
    generated: Sequence[int],
    *,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    stop_ids: Collection[int] = (EOS,),
    logit_bias: Mapping[Any, float] | None = None,
) -> np.ndarray:
    """One row of logits after what SGLang does to it before the temperature, in its order."""
    counts = np.bincount(np.asarray(generated, int), minlength=len(logits))
    x = logits - frequency_penalty * counts - presence_penalty * (counts > 0)
    if len(generated) < min_new_tokens:
        x[list(stop_ids)] = -np.inf
    scaled = np.where(x < 0, x * repetition_penalty, x / repetition_penalty)
    x = np.where(counts > 0, scaled, x)
    for token_id, bias in (logit_bias or {}).items():
        x[int(token_id)] += bias
    return x


def step_logits(
    prompt: Sequence[int],
    output_ids: Sequence[int],
    tensors: Tensors = TENSORS,
    config: ModelConfig = CONFIG,
    **params: Any,
) -> np.ndarray:
    """Logits [len(output_ids), V] that each output token was drawn from, by one plain forward.

    If every token is the largest of its row, the output is the greedy one, by induction.
    """
    raw = forward(tensors, config, [*prompt, *output_ids[:-1]])[len(prompt) - 1 :]
    return np.stack([penalized(row, output_ids[:i], **params) for i, row in enumerate(raw)])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_greedy(prompt: Sequence[int], output_ids: Sequence[int], **oracle: Any) -> None:
    assert step_logits(prompt, output_ids, **oracle).argmax(axis=-1).tolist() == list(output_ids)
