"""The sampling parameters an engine puts under those of its requests."""

from collections.abc import Mapping
from typing import Any

from jaxengine.config import EngineConfig
from jaxengine.errors import ConfigError, RequestError
from jaxengine.locate import locate, read_generation_config
from jaxengine.params import SAMPLER_FIELDS, ParamsParser
from jaxengine.types import Param

GENERATION_CONFIG_KEYS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
"""What SGLang's server takes from `generation_config.json`."""


def default_params(config: EngineConfig, parser: ParamsParser) -> dict[str, Any]:
    """`preferred_sampling_params` over those of the model where `sampling_defaults` asks for them.

    Args:
      config: The engine's.
      parser: For parameters of its sampler.

    Raises:
      ConfigError: For a parameter that is out of range.
      TypeError: For one that nobody knows.
    """
    defaults = dict(config.preferred_params)
    if config.sampling_defaults == "model" and config.model_path:
        defaults = _of_the_model(read_generation_config(locate(config))) | defaults
    try:
        parser.parse(defaults, None)
    except RequestError as error:
        raise ConfigError(f"In the engine's own sampling parameters: {error}") from error
    return defaults


def with_defaults(raw: Any, defaults: Mapping[str, Any], specs: Mapping[str, Param]) -> Any:
    """What a caller gave, over the engine's defaults.

    A `SamplingParams` states every field, so it comes back as it is; so does what is no dict, for
    `ParamsParser` to refuse.

    Args:
      raw: A dict, None, or a list of such.
      defaults: What `default_params` gave.
      specs: Parameters of the call's sampler; defaults that only another one has are left out.
    """
    if isinstance(raw, list | tuple):
        return [with_defaults(item, defaults, specs) for item in raw]
    if raw is not None and not isinstance(raw, Mapping):
        return raw
    fitting = {k: v for k, v in defaults.items() if k in specs or k not in SAMPLER_FIELDS}
    return {**fitting, **(raw or {})}


def _of_the_model(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: generation_config.get(name) for name in GENERATION_CONFIG_KEYS}
    if found["top_k"] == 0:  # transformers' way to say all of them
        found["top_k"] = -1
    return {name: value for name, value in found.items() if value is not None}
