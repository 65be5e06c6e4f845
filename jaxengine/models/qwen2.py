"""Qwen2 and Qwen2.5: biased queries, keys and values.

Source: Qwen2 Technical Report, arXiv:2407.10671.
"""

from jaxengine.config import ModelConfig
from jaxengine.models.decoder import Decoder, weight_parts
from jaxengine.models.family import Family
from jaxengine.models.hf_config import RawConfig, dense_config, sliding_window


def parse_config(raw: RawConfig) -> ModelConfig:
    """Maps `config.json`; see `dense_config`."""
    return dense_config(raw, window=sliding_window(raw), qkv_bias=True)


QWEN2 = Family(parse_config=parse_config, module=Decoder, weight_parts=weight_parts)
