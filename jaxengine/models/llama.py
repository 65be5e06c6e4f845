"""Llama 2 and 3, and Mistral, which is the same but for its sliding window.

Source: Touvron et al., Llama 2, arXiv:2307.09288; The Llama 3 Herd of Models, arXiv:2407.21783;
Jiang et al., Mistral 7B, arXiv:2310.06825.
"""

from jaxengine.config import ModelConfig
from jaxengine.models.decoder import Decoder, weight_parts
from jaxengine.models.family import Family
from jaxengine.models.hf_config import RawConfig, dense_config, require


def parse_llama(raw: RawConfig) -> ModelConfig:
    """Maps `config.json`; see `dense_config`."""
    require(raw, "pretraining_tp", (1, None))
    return dense_config({"max_position_embeddings": 2048, **raw})


def parse_mistral(raw: RawConfig) -> ModelConfig:
    """Maps `config.json`; a sliding window limits the context length to itself."""
    return dense_config(raw, window=raw.get("sliding_window", 4096))


LLAMA = Family(parse_config=parse_llama, module=Decoder, weight_parts=weight_parts)
MISTRAL = Family(parse_config=parse_mistral, module=Decoder, weight_parts=weight_parts)
