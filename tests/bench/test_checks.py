"""The comparison with the plain path: what rounding alone does passes, a wrong kernel does not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.bench import checks, plain
from jaxengine.bench.calls import Call
from jaxengine.bench.plain import PlainModel
from jaxengine.bench.shapes import SHAPES
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel, Params
from jaxengine.models.qwen2 import parse_config
from jaxengine.nn.attention import Attend
from jaxengine.runtime.sharding import make_mesh
from jaxengine.runtime.weights import place, random_params

RAW = SHAPES["tiny"] | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "vocab_size": 2048,
}
CONFIG = parse_config(RAW)
TOLERANCE = checks.TOLERANCES["bfloat16"]
PROMPT, IDS = np.split(np.random.default_rng(0).integers(0, CONFIG.vocab_size, 128), [28])
LISTED = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (len(IDS), 20))
CALL = Call([PROMPT.tolist()], [{"max_new_tokens": len(IDS), "temperature": 1.0}])


def judge(dtype: str, params: Params) -> np.ndarray:
    model = PlainModel(CONFIG, params, TOLERANCE, dtype)
    return model.judge(PROMPT.tolist(), IDS.tolist(), LISTED.astype(np.int32)).logprobs


@pytest.fixture(scope="module")
def params() -> Params:
    model = BoundModel(MODELS[CONFIG.architecture], CONFIG, jnp.dtype("bfloat16"))
    return random_params(place(model, make_mesh(jax.devices()[:1])))


@pytest.fixture(scope="module")
def compared(params: Params) -> Callable[[np.ndarray], checks.Comparison]:
    """Compares log-probabilities as if an engine had reported them."""
    models = [PlainModel(CONFIG, params, TOLERANCE, dtype) for dtype in ("float32", "bfloat16")]

    def compare(logprobs: np.ndarray) -> checks.Comparison:
        tops = [
            [(value, int(i), None) for value, i in zip(row, ids, strict=True)]
            for row, ids in zip(logprobs[:, 1:], LISTED, strict=True)
        ]
        meta = {"output_token_raw_logprobs": logprobs[:, 0], "output_top_logprobs": tops}
        output = {"output_ids": IDS.tolist(), "meta_info": meta}
        return checks.compare(CALL, [output], models[0], models[1], TOLERANCE)

    return compare


def changed(params: Params, end: str, change: Callable[[jax.Array], jax.Array]) -> Params:
    """These params with another leaf wherever the name ends so."""

    def leaf(path: Any, value: jax.Array) -> jax.Array:
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        return change(value) if name.endswith(end) else value

    return jax.tree_util.tree_map_with_path(leaf, params)


def rounded_elsewhere(attend: Attend) -> Attend:
    """Attention in float32, its result rounded: as right, and not the same bits."""

    def wide(q: Any, k: Any, v: Any, *others: Any) -> Any:
        out, pages = attend(*(x.astype(jnp.float32) for x in (q, k, v)), *others)
        return out.astype(q.dtype), pages

    return wide


def stale_tile(attend: Attend) -> Attend:
    """Attention that finds the first 16 keys and values again where the next should be."""

    def stale(q: Any, k: Any, v: Any, *others: Any) -> Any:
        k, v = (x.at[16:32].set(x[:16]) for x in (k, v))
        return attend(q, k, v, *others)

    return stale


@pytest.fixture
def with_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    dense = plain.dense_attention
    return lambda kernel: monkeypatch.setattr(
        plain, "dense_attention", lambda rows: kernel(dense(rows))
    )


def test_another_way_to_round_passes(params: Params, compared: Any, with_attention: Any):
    with_attention(rounded_elsewhere)
    comparison = compared(judge("bfloat16", params))
    assert all(comparison.checks.values())
    numbers = comparison.numbers
    assert 0 < numbers["plain_rms_logprob_error"] < numbers["rms_tolerance"]
    assert numbers["rms_logprob_error"] < 1.2 * numbers["plain_rms_logprob_error"]


def test_dropped_bias_fails(params: Params, compared: Any):
    wrong = changed(params, "layers.1.attn.qkv.bias", jnp.zeros_like)
    assert not compared(judge("bfloat16", wrong)).checks["logprobs_as_plain"]


def test_scale_that_is_wrong_by_one_percent_fails(params: Params, compared: Any):
    wrong = changed(
        params, "embed.weight", lambda x: (1.01 * x.astype(jnp.float32)).astype(x.dtype)
    )
    comparison = compared(judge("bfloat16", wrong))
    assert not comparison.checks["logprobs_as_plain"]
    assert comparison.numbers["max_logprob_error"] < TOLERANCE, "the largest error alone is blind"


def test_stale_tile_of_keys_and_values_fails(params: Params, compared: Any, with_attention: Any):
    with_attention(stale_tile)
    assert not compared(judge("bfloat16", params)).checks["logprobs_as_plain"]


def test_large_model_may_be_off_by_what_rounding_costs_it():
    allowed = checks.allowed_errors(checks.Errors(largest=0.08, rms=0.02), TOLERANCE)
    assert allowed == pytest.approx((0.12, 0.03))
    assert checks.allowed_errors(checks.Errors(0.0, 0.0), 2e-3) == pytest.approx((2e-3, 1e-4))
