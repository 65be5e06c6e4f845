"""What a model family must tell: its config map, its module, and its weight names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxengine.config import ModelConfig
from jaxengine.nn.attention import ForwardContext

type Params = dict[str, Any]
"""Nested dict of arrays: what jitted code sees of a module."""


class WeightPart(NamedTuple):
    """Where a checkpoint tensor goes.

    Attributes:
      path: Dotted path of the parameter.
      start: First row of the parameter that this tensor fills.
      shape: Shape of the tensor.
    """

    path: str
    start: int
    shape: tuple[int, ...]


class Family(NamedTuple):
    """A model family.

    Attributes:
      parse_config: `config.json` as a dict -> ModelConfig; raises on what is not supported.
      module: `module(config, dtype=..., rngs=...)` builds the Flax module.
      weight_parts: Checkpoint tensor name -> WeightPart.
    """

    parse_config: Callable[[Mapping[str, Any]], ModelConfig]
    module: Callable[..., nnx.Module]
    weight_parts: Callable[[ModelConfig], dict[str, WeightPart]]


class BoundModel:
    """A module without its arrays: `bind(params)` gives the module back, inside jit.

    Attributes:
      config: The model's shape.
      dtype: Of weights and activations.
      abstract: Shapes and dtypes of the parameters, as a nested dict.
      axes: Logical axes of the parameters, the same nesting.
    """

    def __init__(self, family: Family, config: ModelConfig, dtype: jnp.dtype) -> None:
        module = nnx.eval_shape(lambda: family.module(config, dtype=dtype, rngs=nnx.Rngs(0)))
        self._graph, self._state = nnx.split(module)
        self.config = config
        self.dtype = dtype
        self.abstract: Params = nnx.to_pure_dict(self._state)
        self.axes: Params = nnx.to_pure_dict(
            jax.tree.map(lambda v: v.get_metadata()["axes"], self._state, is_leaf=_is_variable)
        )

    def bind(self, params: Params) -> Any:
        """The module over these arrays; costs nothing but tracing."""
        state = jax.tree.map(lambda leaf: leaf, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)


def run_layer(layer: nnx.Module, ctx: ForwardContext, *args: Any) -> Any:
    """`layer(*args, ctx)`, traced and lowered once for all layers that differ in arrays alone.

    XLA inlines the calls, so the compiled program is the same; tracing two dozen unrolled layers
    is what a start would wait for.
    """
    graph, state = nnx.split(layer)
    # A layer looks at no one else's residual stream, and jit keeps what it was called with.
    return _run_layer(graph, dataclasses.replace(ctx, see=ForwardContext.see), state, *args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(graph: Any, ctx: ForwardContext, state: Any, *args: Any) -> Any:
    return nnx.merge(graph, state)(*args, ctx)


def _is_variable(value: object) -> bool:
    return isinstance(value, nnx.Variable)
