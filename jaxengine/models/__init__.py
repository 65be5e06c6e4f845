"""Model families: one file each, with a config map, a Flax module and a weight-name table."""

from jaxengine.models.family import Family, WeightPart
from jaxengine.models.llama import LLAMA, MISTRAL
from jaxengine.models.qwen2 import QWEN2
from jaxengine.models.qwen3 import QWEN3

MODELS: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
"""Architecture name in `config.json` -> how to build and load it."""

__all__ = ["MODELS", "Family", "WeightPart"]
