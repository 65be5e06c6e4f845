"""Writes small GGUF files as llama.cpp's converter does, and quantises K-blocks by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from jaxengine.config import ModelConfig
from jaxengine.models import MODELS

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
OWN_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def own_name(name: str) -> str:
    """The tensor's name in a GGUF file."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        _, _, layer, rest = module.split(".", 3)
        return f"blk.{layer}.{OWN_NAMES[rest]}.{kind}"
    return f"{OWN_NAMES[module]}.{kind}"


def permuted(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    quantised: Mapping[str, tuple[np.ndarray, Type]] | None = None,
    *,
    kind: Type = Type.F32,
    tokenizer: Any = None,
    rope_freqs: np.ndarray | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """A model under its Hugging Face names becomes one file.

    Args:
      path: Where.
      config: The model's shape.
      tensors: Float32; matrices are stored as `kind`, vectors as they are.
      quantised: Bytes of some matrices, and their type; in the file's own order of rows.
      kind: Type of the other matrices.
      tokenizer: A byte-level BPE for the metadata.
      rope_freqs: Divisors of the rotary frequencies.
      extra: Further metadata, below the architecture's name.
    """
    arch = ARCHITECTURES[config.architecture]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        else:
            writer.add_float32(f"{arch}.{key}", value)
    if tokenizer is None:
        writer.add_eos_token_id(config.eos_token_ids[0])
    else:
        add_tokenizer(writer, tokenizer)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.astype(np.float32))
    for name in MODELS[config.architecture].weight_parts(config):
        if quantised and name in quantised:
            data, raw_kind = quantised[name]
            writer.add_tensor(own_name(name), data, raw_dtype=raw_kind)
            continue
        tensor = tensors[name]
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            num_heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            tensor = permuted(tensor, num_heads)
        own_kind = kind if tensor.ndim > 1 else Type.F32
        writer.add_tensor(
            own_name(name), gguf.quants.quantize(tensor, own_kind), raw_dtype=own_kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """Metadata of a byte-level BPE, from the file transformers would write."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = {token["id"]: token["special"] for token in model["added_tokens"]}
    normal, control, user_defined = 1, 3, 4
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(
        [normal if i not in special else control if special[i] else user_defined for _, i in vocab]
    )
    writer.add_token_merges([" ".join(merge) for merge in model["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def random_q5_k(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of Q5_K, likewise: those of Q4_K with a fifth bit of every code."""
    return random_q4_k(rng, rows, cols, has_fifth_bit=True)


def random_q4_k(
    rng: np.random.Generator, rows: int, cols: int, *, has_fifth_bit: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of Q4_K and what they mean, value by value.

    Source: `block_q4_K`, `block_q5_K` and their `dequantize_row` of ggml-quants.c.
    """
    blocks, values = [], []
    for _ in range(rows * cols // 256):
        d, dmin = rng.uniform(0.001, 0.01, 2).astype(np.float16)
        scales, mins = rng.integers(0, 64, (2, 8), dtype=np.uint8)
        codes = rng.integers(0, 32 if has_fifth_bit else 16, 256, dtype=np.uint8)
        packed = np.zeros(12, np.uint8)
        for j in range(4):
            packed[j] = scales[j] | (scales[j + 4] >> 4) << 6
            packed[j + 4] = mins[j] | (mins[j + 4] >> 4) << 6
            packed[j + 8] = (scales[j + 4] & 15) | (mins[j + 4] & 15) << 4
        high = ((codes >> 4).reshape(8, 32) << np.arange(8)[:, None]).sum(axis=0)
        quads = (codes & 15).reshape(4, 2, 32)  # 64 values in 32 bytes: low nibbles first
        nibbles = (quads[:, 0] | quads[:, 1] << 4).reshape(-1)
        header = np.array([d, dmin], np.float16).view(np.uint8)
        fifth = [high.astype(np.uint8)] * has_fifth_bit
        blocks.append(np.concatenate([header, packed, *fifth, nibbles]))
        for i, code in enumerate(codes):
            scale, low = int(scales[i // 32]), int(mins[i // 32])
            values.append(float(d) * scale * int(code) - float(dmin) * low)
    data = np.concatenate(blocks).reshape(rows, -1)
    return data, np.array(values, np.float32).reshape(rows, cols)


def random_q6_k(rng: np.random.Generator, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of Q6_K and what they mean, value by value.

    Source: `block_q6_K` and `dequantize_row_q6_K` of ggml-quants.c.
    """
    blocks, values = [], []
    for _ in range(rows * cols // 256):
        d = np.float16(rng.uniform(0.001, 0.01))
        scales = rng.integers(-30, 30, 16, dtype=np.int8)
        codes = rng.integers(0, 64, 256, dtype=np.uint8)
        low, high = np.zeros(128, np.uint8), np.zeros(64, np.uint8)
        for i, code in enumerate(codes):
            half, place = divmod(i, 128)
            quarter, at = divmod(place, 32)
            low[64 * half + 32 * (quarter % 2) + at] |= (code & 15) << 4 * (quarter // 2)
            high[32 * half + at] |= (code >> 4) << 2 * quarter
        blocks.append(
            np.concatenate([low, high, scales.view(np.uint8), np.array([d]).view(np.uint8)])
        )
        values += [
            float(d) * int(scales[i // 16]) * (int(code) - 32) for i, code in enumerate(codes)
        ]
    data = np.concatenate(blocks).reshape(rows, -1)
    return data, np.array(values, np.float32).reshape(rows, cols)
