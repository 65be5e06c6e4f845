"""What all families share: the module without its arrays, and its layers."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxengine.bench.shapes import SHAPES
from jaxengine.models import MODELS
from jaxengine.models.decoder import DecoderLayer
from jaxengine.models.family import BoundModel
from jaxengine.models.qwen2 import parse_config
from jaxengine.nn.attention import ForwardContext, dense_attention


def test_layers_that_differ_in_arrays_alone_are_traced_once(monkeypatch: pytest.MonkeyPatch):
    traced, whole = [], DecoderLayer.__call__

    def watched(self: DecoderLayer, *args: Any) -> Any:
        traced.append(self)
        return whole(self, *args)

    monkeypatch.setattr(DecoderLayer, "__call__", watched)
    config = parse_config({**SHAPES["tiny"], "num_hidden_layers": 5})
    model = BoundModel(MODELS[config.architecture], config, jnp.dtype("float32"))
    seen: list[int] = []
    ctx = ForwardContext(attend=dense_attention(1), see=lambda i, x: seen.append(i))

    def forward(params: Any, ids: jax.Array) -> jax.Array:
        return model.bind(params)(ids, ids, None, None, ctx)[0]

    out = jax.eval_shape(forward, model.abstract, jax.ShapeDtypeStruct((8,), jnp.int32))
    assert out.shape == (8, config.hidden_size)
    assert len(traced) == 1 and seen == [0, 1, 2, 3, 4]
