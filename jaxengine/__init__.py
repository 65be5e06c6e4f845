"""An offline LLM inference engine in JAX.

Importing this package loads no jax and changes no global state: every public name is fetched when
it is first used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxengine import errors, sampling
    from jaxengine.config import EngineConfig
    from jaxengine.display import show
    from jaxengine.engine import Engine
    from jaxengine.params import SamplingParams
    from jaxengine.utils import async_stream_and_merge, stream_and_merge

__all__ = [
    "DEMO_MODEL",
    "Engine",
    "EngineConfig",
    "SamplingParams",
    "__version__",
    "async_stream_and_merge",
    "errors",
    "sampling",
    "show",
    "stream_and_merge",
]

__version__ = "0.1.0"

DEMO_MODEL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "demo")
"""Path of the embedded demo model, in Hugging Face layout."""

_MODULE_OF = {
    "Engine": "engine",
    "EngineConfig": "config",
    "SamplingParams": "params",
    "async_stream_and_merge": "utils",
    "show": "display",
    "stream_and_merge": "utils",
}


def __getattr__(name: str) -> Any:
    if name in ("errors", "sampling"):
        return import_module(f"jaxengine.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'jaxengine' has no attribute {name!r}")
    value = getattr(import_module(f"jaxengine.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
