"""The research room: samplers as pure functions traced into the decode loop."""

from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.draw import Draw, gumbel_max
from jaxengine.sampling.sampler import Sampler, default_sampler
from jaxengine.sampling.transforms import Drawn, LogitsTransform, chain, when
from jaxengine.types import Param

__all__ = [
    "Draw",
    "Drawn",
    "LogitsTransform",
    "Param",
    "Sampler",
    "SamplingContext",
    "chain",
    "default_sampler",
    "gumbel_max",
    "when",
]
