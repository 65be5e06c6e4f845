"""The research room: samplers as pure functions traced into the decode loop."""

from jaxengine.sampling.builtin.adaptive import dynamic_temperature, mirostat_v2
from jaxengine.sampling.builtin.constraints import (
    allowed_tokens,
    bad_words,
    forced_tokens,
    thinking_budget,
)
from jaxengine.sampling.builtin.filters import epsilon, eta, top_n_sigma, typical, xtc
from jaxengine.sampling.builtin.guidance import classifier_free_guidance, contrastive
from jaxengine.sampling.builtin.repetition import dry, no_repeat_ngram
from jaxengine.sampling.builtin.standard import (
    additive_penalties,
    logit_bias,
    min_new_tokens,
    repetition_penalty,
    temperature,
    top_k_top_p_min_p,
)
from jaxengine.sampling.builtin.watermark import Detection, detect_watermark, watermark
from jaxengine.sampling.checking import check
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.draw import Draw, gumbel_max
from jaxengine.sampling.sampler import Combine, Sampler, as_sampler, default_sampler
from jaxengine.sampling.transforms import Drawn, LogitsTransform, Needs, chain, per_row, when
from jaxengine.types import Param

__all__ = [
    "Combine",
    "Detection",
    "Draw",
    "Drawn",
    "LogitsTransform",
    "Needs",
    "Param",
    "Sampler",
    "SamplingContext",
    "additive_penalties",
    "allowed_tokens",
    "as_sampler",
    "bad_words",
    "chain",
    "check",
    "classifier_free_guidance",
    "contrastive",
    "default_sampler",
    "detect_watermark",
    "dry",
    "dynamic_temperature",
    "epsilon",
    "eta",
    "forced_tokens",
    "gumbel_max",
    "logit_bias",
    "min_new_tokens",
    "mirostat_v2",
    "no_repeat_ngram",
    "per_row",
    "repetition_penalty",
    "temperature",
    "thinking_budget",
    "top_k_top_p_min_p",
    "top_n_sigma",
    "typical",
    "watermark",
    "when",
    "xtc",
]
