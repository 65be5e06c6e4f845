"""Where new weights come from: a tree of arrays, tensors by their checkpoint names, a folder."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxengine import build
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.errors import WeightsError
from jaxengine.locate import locate, read_model_config
from jaxengine.models import MODELS
from jaxengine.models.family import Params
from jaxengine.runtime import weights


class WeightSources:
    """Checks weights of any source against one model, and places them."""

    def __init__(self, config: EngineConfig, model: ModelConfig, target: Params) -> None:
        """Takes the engine's settings, the model's shape, and its arrays' shapes and places."""
        self._config, self._model, self._target = config, model, target
        self._family = MODELS[model.architecture]
        self._parts = self._family.weight_parts(model)

    def read(self, source: Any, *, is_partial: bool) -> Callable[[Params | None], Params]:
        """How to make parameters of a source, given the present ones.

        Args:
          source: A tree like `Engine.params`; a dict, or list of pairs, of checkpoint name and
            array; or a checkpoint folder or hub id.
          is_partial: Names may be missing; what they name stays as it is.
        """
        if isinstance(source, str | os.PathLike):
            return lambda current: self._load(str(source))
        tensors = dict(source) if isinstance(source, list | tuple) else source
        if isinstance(tensors, nnx.State):
            tensors = nnx.to_pure_dict(tensors)
        if not isinstance(tensors, Mapping) or not tensors:
            raise WeightsError(
                "Weights must be a tree of arrays, a dict of checkpoint names, or a folder, got "
                f"{type(source).__name__}."
            )
        if any(isinstance(value, Mapping) for value in tensors.values()):
            return lambda current: weights.check_params(dict(tensors), self._target)
        return lambda current: self._merge(tensors, current, is_partial)

    def place(self, params: Any) -> Params:
        """Puts a copy on the host back on the device."""
        return weights.check_params(params, self._target)

    def named(self, name: str, params: Params | None) -> jax.Array | None:
        """The array a checkpoint calls by this name; None where there is none."""
        return None if params is None else weights.named(name, self._parts, params)

    def _load(self, path: str) -> Params:
        config = dataclasses.replace(self._config, model_path=path, load_format="auto")
        shape = read_model_config(locate(config), config.model_overrides)
        same = dataclasses.replace(
            shape, dtype=self._model.dtype, eos_token_ids=self._model.eos_token_ids
        )
        if same != self._model:
            raise WeightsError(f"The model in {path} is {shape}, this engine's is {self._model}.")
        return build.load_params(config, self._family, self._model, self._target, progress=False)

    def _merge(
        self, tensors: Mapping[str, Any], current: Params | None, is_partial: bool
    ) -> Params:
        if current is None and is_partial:
            raise WeightsError("The weights are released, so all of them are needed, not a part.")
        return weights.merge_named(
            tensors, self._parts, current, self._target, is_partial=is_partial
        )
