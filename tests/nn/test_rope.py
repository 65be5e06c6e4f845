"""Rotary frequencies of published models equal transformers', whatever their scaling."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxengine.config import RopeScaling
from jaxengine.errors import UnsupportedModelError
from jaxengine.models.hf_config import rope_scaling
from jaxengine.nn.rope import frequencies, rotation

with safe_open(Path(__file__).parent.parent / "golden" / "rope.safetensors", "numpy") as file:
    ROPES = json.loads(file.metadata()["ropes"])
    EXPECTED = {name: file.get_tensor(f"rope.{name}") for name in ROPES}


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_attention_factor_match_transformers(name: str):
    head_dim, theta, most, raw = ROPES[name]
    scaling = rope_scaling(raw, most)
    np.testing.assert_allclose(
        frequencies(head_dim, theta, scaling), EXPECTED[name][:-1], rtol=1e-6, atol=1e-12
    )
    factor = 1.0 if scaling is None else scaling.attention_factor
    assert factor == pytest.approx(EXPECTED[name][-1], rel=1e-6)


def test_attention_factor_scales_cosines_and_sines():
    scaling = RopeScaling(kind="yarn", factor=2.0, original_context_len=64, attention_factor=1.5)
    cos, sin = rotation(jnp.arange(100), 8, 10000.0, scaling)
    np.testing.assert_allclose(np.hypot(cos, sin), 1.5, rtol=1e-6)


def test_dynamic_scaling_is_plain_up_to_the_models_own_context():
    assert rope_scaling({"type": "dynamic", "factor": 2.0}, 4096) is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"rope_type": "longrope", "factor": 2.0},
            "`rope_type` .* .longrope.; supported: ",
        ),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "`partial_rotary_factor` .* 0.5"),
    ],
)
def test_other_rotary_embeddings_are_refused_by_name(raw: dict, message: str):
    with pytest.raises(UnsupportedModelError, match=message):
        rope_scaling(raw, 4096)
