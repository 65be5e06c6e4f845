"""Model shapes by name, as `config.json`; their weights are random. Knows nothing of jax."""

import json
from pathlib import Path
from typing import Any

from jaxengine import DEMO_MODEL


def _qwen(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **others: Any) -> dict:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    } | others


_UNTIED = {"vocab_size": 152064, "tie_word_embeddings": False}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": _qwen(2048, 11008, 36, 16, 2),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4, **_UNTIED),
    "qwen2.5-14b": _qwen(5120, 13824, 48, 40, 8, **_UNTIED),
    "qwen2.5-32b": _qwen(5120, 27648, 64, 40, 8, **_UNTIED),
    "demo": json.loads(Path(DEMO_MODEL, "config.json").read_text()),
    "tiny": _qwen(64, 128, 2, 4, 2, vocab_size=512, max_position_embeddings=256),
}
"""Qwen2.5's sizes, the demo model's, and one for tests.

Source: config.json of the Qwen2.5 models, arXiv:2412.15115.
"""


def write_config(shape: str, folder: Path) -> Path:
    """Writes a shape's `config.json`, all that `load_format="dummy"` reads."""
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    return folder
