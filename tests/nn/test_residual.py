"""The residual stream is the same sum whether a product is added at once or in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxengine.nn import residual
from jaxengine.nn.attention import ForwardContext
from jaxengine.nn.layers import Linear, RMSNorm

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")


@pytest.mark.parametrize("count", [2, 4])
def test_parts_make_the_same_sum_and_norm(count: int, monkeypatch: pytest.MonkeyPatch):
    keys = jax.random.split(jax.random.key(0), 2)
    stream, inner = jax.random.normal(keys[0], (5, 16)), jax.random.normal(keys[1], (5, 64))
    axes = ("embed", "ffn")
    down = Linear(64, 16, axes=axes, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))
    norm = RMSNorm(16, eps=1e-6, dtype=jnp.dtype("float32"))

    def run(kernels):
        ctx = ForwardContext(kernels=kernels)
        after = residual.add_product(stream, inner, down, ctx)
        x, normed, norm_left = after.enter(norm, ctx)
        return after, x, normed if norm_left is None else norm_left(normed)

    monkeypatch.setattr(residual, "num_parts", lambda x, weight: count)
    whole, want, want_norm = run("reference")
    cut, got, got_norm = run("triton_interpret")
    assert whole.parts is None
    assert cut.parts is not None and cut.parts.shape == (count, 5, 16)
    np.testing.assert_allclose(cut.total(), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_norm, want_norm, rtol=1e-5, atol=1e-6)
