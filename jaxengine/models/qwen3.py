"""Qwen3 dense: every query and key head is normalised, no biases, a head size of its own.

Source: Qwen3 Technical Report, arXiv:2505.09388.
"""

from jaxengine.config import ModelConfig
from jaxengine.models.decoder import Decoder, weight_parts
from jaxengine.models.family import Family
from jaxengine.models.hf_config import RawConfig, dense_config, sliding_window


def parse_config(raw: RawConfig) -> ModelConfig:
    """Maps `config.json`; see `dense_config`."""
    # transformers' default, which a config may leave out: it is not hidden_size / num_heads.
    head_dim = raw.get("head_dim") or 128
    return dense_config({**raw, "head_dim": head_dim}, window=sliding_window(raw), qk_norm=True)


QWEN3 = Family(parse_config=parse_config, module=Decoder, weight_parts=weight_parts)
