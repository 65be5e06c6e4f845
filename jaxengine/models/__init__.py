"""Model families: one file each, with a config map, a Flax module and a weight-name table."""

from jaxengine.models.family import Family, WeightPart
from jaxengine.models.qwen2 import QWEN2

MODELS: dict[str, Family] = {"Qwen2ForCausalLM": QWEN2}
"""Architecture name in `config.json` -> how to build and load it."""

__all__ = ["MODELS", "Family", "WeightPart"]
