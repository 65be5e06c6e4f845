"""Every exception jaxengine raises on purpose.

    JaxEngineError
    ├── ConfigError (ValueError)        a setting is unknown, out of range, or does not fit
    │   └── UnsupportedModelError       the checkpoint needs what jaxengine does not implement
    ├── RequestError (ValueError)       one request is wrong; nobody else is touched
    │   ├── PromptTooLongError          the prompt does not fit the context or the page pool
    │   └── SamplerError                a sampler cannot be traced, or left no token to draw
    ├── CapacityError (RuntimeError)    the device cannot hold what was asked of it
    │   └── QueueFullError              more wait already than `max_queued_requests` allows
    ├── WeightsError (ValueError)       missing, unexpected or misshapen tensors, all named at once
    ├── StepError (RuntimeError)        a device step failed, and the requests of that batch with it
    ├── NaNLogitsError (RuntimeError)   the model gave NaN for this request
    ├── JobError (RuntimeError)         a batch job gave up; what it did is kept
    └── EngineDeadError (RuntimeError)  the engine was shut down, or failed to start

A message says what, what was got, the limit, and the remedy; arguments stand in backticks.
"""


class JaxEngineError(Exception):
    """Base of all errors raised by jaxengine."""


class ConfigError(JaxEngineError, ValueError):
    """A setting is unknown, out of range, or does not fit the model."""


class UnsupportedModelError(ConfigError):
    """The checkpoint needs something jaxengine does not implement."""


class RequestError(JaxEngineError, ValueError):
    """One request is wrong; a `ValueError` too, so scripts written for SGLang catch it."""


class PromptTooLongError(RequestError):
    """The prompt does not fit the context length or the page pool."""


class SamplerError(RequestError):
    """A sampler cannot be traced into the engine, or left no token to draw."""


class CapacityError(JaxEngineError, RuntimeError):
    """The device cannot hold what was asked of it."""


class QueueFullError(CapacityError):
    """More would wait than `max_queued_requests` allows; nothing of the call was queued."""


class WeightsError(JaxEngineError, ValueError):
    """Tensors are missing, unexpected or misshapen; the message names all of them."""


class StepError(JaxEngineError, RuntimeError):
    """A device step failed; the requests of that batch fail with it, the engine goes on."""


class NaNLogitsError(JaxEngineError, RuntimeError):
    """The model produced NaN logits for this request."""


class JobError(JaxEngineError, RuntimeError):
    """A batch job gave up; what it did is kept, and a second run goes on from there."""


class EngineDeadError(JaxEngineError, RuntimeError):
    """The engine was shut down or could not start."""
