"""The research room: samplers as pure functions traced into the decode loop."""

from jaxengine.sampling.builtin.standard import (
    additive_penalties,
    logit_bias,
    min_new_tokens,
    repetition_penalty,
    temperature,
    top_k_top_p_min_p,
)
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.draw import Draw, gumbel_max
from jaxengine.sampling.sampler import Sampler, as_sampler, default_sampler
from jaxengine.sampling.transforms import Drawn, LogitsTransform, Needs, chain, per_row, when
from jaxengine.types import Param

__all__ = [
    "Draw",
    "Drawn",
    "LogitsTransform",
    "Needs",
    "Param",
    "Sampler",
    "SamplingContext",
    "additive_penalties",
    "as_sampler",
    "chain",
    "default_sampler",
    "gumbel_max",
    "logit_bias",
    "min_new_tokens",
    "per_row",
    "repetition_penalty",
    "temperature",
    "top_k_top_p_min_p",
    "when",
]
