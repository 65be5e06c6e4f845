"""A logit processor as a stage of a sampler: what SGLang calls `custom_logit_processor`."""

from collections.abc import Callable
from typing import Any

from jaxengine.errors import RequestError
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.sampler import Sampler
from jaxengine.sampling.transforms import Logits, LogitsTransform, State, chain


def with_processor(sampler: Sampler, processor: Any) -> Sampler:
    """Puts a processor where SGLang has it: after penalties and bias, before the temperature.

    Args:
      sampler: Whose chain it joins; in one without a temperature it comes before the filters.
      processor: `(logits f32[B, V], ctx) -> logits`, or a `LogitsTransform`, whose parameters
        become keys of the sampling parameters.

    Raises:
      RequestError: For SGLang's pickled string, or anything else.
    """
    stages = sampler.stages
    here = next(
        (i for i, s in enumerate(stages) if "temperature" in s.params or s.is_filter), len(stages)
    )
    stage = _as_transform(processor)
    return sampler._replace(transform=chain(*stages[:here], stage, *stages[here:]))


def _as_transform(processor: Any) -> LogitsTransform:
    if isinstance(processor, LogitsTransform):
        return processor
    if not callable(processor):
        what = "a pickled string" if isinstance(processor, str) else type(processor).__name__
        raise RequestError(
            "`custom_logit_processor` must be a function (logits, ctx) -> logits or a transform, "
            f"one for the whole call, got {what}. Requests are never unpickled: pass the function."
        )
    return LogitsTransform(_applier(processor))


def _applier(processor: Callable[..., Any]) -> Callable[..., Logits]:
    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        return processor(logits, ctx)

    return apply
