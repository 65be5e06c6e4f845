"""What all dense decoders have in common in their `config.json`."""

import math
from collections.abc import Mapping
from typing import Any

from jaxengine.config import ModelConfig, RopeScaling
from jaxengine.errors import UnsupportedModelError

type RawConfig = Mapping[str, Any]
"""`config.json` as a dict."""


def dense_config(raw: RawConfig, *, window: int | None = None, **flags: Any) -> ModelConfig:
    """Maps `config.json` of a dense decoder.

    Args:
      raw: `config.json` of transformers 4 or 5.
      window: Positions a token attends to, its own included; None for all. Up to that many tokens
        sliding and full attention are the same, so the window limits the context length.
      flags: Fields of `ModelConfig` in which the family differs.

    Raises:
      UnsupportedModelError: Names the field whose value is not supported, and what is.
    """
    require(raw, "hidden_act", ("silu",), default="silu")
    require(raw, "quantization_config", (None,))
    for bias in ("mlp_bias", *(() if flags.get("qkv_bias") else ("attention_bias",))):
        require(raw, bias, (False, None))
    dtype = "dtype" if raw.get("dtype") else "torch_dtype"
    require(raw, dtype, ("float32", "bfloat16", "float16", None))
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    most = raw.get("max_position_embeddings", 32768)
    scaling = rope_scaling(rope, raw.get("original_max_position_embeddings") or most)
    most = _stretched(most, scaling)
    eos = raw.get("eos_token_id")
    return ModelConfig(
        architecture=raw["architectures"][0],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0),
        rope_scaling=scaling,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=min(most, window or most),
        sliding_window=window,
        dtype=raw.get(dtype) or "bfloat16",
        eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        **flags,
    )


def rope_scaling(rope: Mapping[str, Any], original_context_len: int) -> RopeScaling | None:
    """Maps `rope_scaling`, which transformers 5 calls `rope_parameters`.

    Args:
      rope: Empty for plain rotary embedding.
      original_context_len: Where `rope` does not say it itself.

    Raises:
      UnsupportedModelError: For a kind that is not implemented.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    # Dynamic scaling changes nothing up to the model's own context length, and none is longer here.
    kinds = ("default", "dynamic", "linear", "llama3", "yarn")
    require({"rope_type": kind}, "rope_type", kinds)
    require(rope, "partial_rotary_factor", (1, None))
    if kind in ("default", "dynamic"):
        return None
    factor = float(rope["factor"])
    given = {
        name: rope[name]
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate")
        if rope.get(name) is not None
    }
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context_len=rope.get("original_max_position_embeddings") or original_context_len,
        attention_factor=_attention_factor(rope, factor) if kind == "yarn" else 1.0,
        **given,
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return mscale(1)


def _stretched(context_len: int, scaling: RopeScaling | None) -> int:
    """The context length with scaling; Llama 3's configs state the stretched one."""
    if scaling is None or scaling.kind == "llama3":
        return context_len
    return max(context_len, int(scaling.factor * scaling.original_context_len))


def sliding_window(raw: RawConfig) -> int | None:
    """The window of a config that lists `layer_types`, or says from which layer on one slides."""
    kinds = raw.get("layer_types")
    if kinds is not None:
        for kind in kinds:
            require({"layer_types": kind}, "layer_types", ("full_attention", "sliding_attention"))
        return raw.get("sliding_window") if "sliding_attention" in kinds else None
    first = raw.get("max_window_layers", 28)
    is_sliding = raw.get("use_sliding_window") and first < raw["num_hidden_layers"]
    return raw.get("sliding_window", 4096) if is_sliding else None


def require(raw: RawConfig, field: str, supported: tuple[Any, ...], default: Any = None) -> None:
    """Checks a field of which only some values are implemented.

    Raises:
      UnsupportedModelError: Names the field, its value, and what is supported.
    """
    got = raw.get(field, default)
    if got not in supported:
        choices = ", ".join(repr(value) for value in supported)
        raise UnsupportedModelError(
            f"`{field}` of this checkpoint is {got!r}; supported: {choices}."
        )
