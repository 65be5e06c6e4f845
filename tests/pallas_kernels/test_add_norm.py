"""The sum of a product's parts and its norm, every backend against float64."""

import inspect
import secrets
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.add_norm import api
from pallas_kernels.add_norm.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.dispatch import Implementation
from tests.pallas_kernels.oracle import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

SMALL_SPECS = [spec for spec in ARG_SPECS if spec.num_rows < 16]


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


def check(spec: ArgSpec, dtype: Any, implementation: Implementation, seed: int) -> None:
    args = spec.arrays(dtype, seed)
    x, norm = api.add_norm(**args, **spec.options, implementation=implementation)
    assert x.dtype == norm.dtype == dtype
    parts, residual, weight = (
        np.asarray(args[n], np.float64) for n in ("parts", "residual", "weight")
    )
    total = residual + parts.sum(axis=0)
    assert_close(x, total)
    # Of what was rounded: a norm of the exact sum would differ by the rounding.
    rounded = np.asarray(x, np.float64)
    rms = np.sqrt((rounded**2).mean(axis=1, keepdims=True) + spec.options["eps"])
    assert_close(norm, rounded / rms * weight)


@pytest.mark.parametrize("implementation", ["reference", "triton_interpret"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_sum_and_norm(spec: ArgSpec, dtype: Any, implementation: Implementation, seed: int):
    check(spec, dtype, implementation, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_kernel_is_the_sum_and_its_norm(spec: ArgSpec, seed: int):
    check(spec, jnp.bfloat16, "triton", seed)


@pytest.mark.parametrize(
    "rows, depth, columns, parts",
    [
        (16, 4864, 896, 8),
        (64, 4864, 896, 4),
        (256, 4864, 896, 4),
        (512, 4864, 896, 4),
        (513, 4864, 896, 1),  # many rows, or columns: tiles enough as it is
        (256, 18944, 3584, 1),
        (16, 352, 128, 1),  # not deep
        (16, 4872, 896, 1),  # no parts of whole steps
    ],
)
def test_few_tiles_are_cut_into_parts(rows: int, depth: int, columns: int, parts: int):
    x = jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((columns, depth), jnp.bfloat16)
    num_parts = inspect.unwrap(api.num_parts)
    assert num_parts(x, weight) == parts
    assert num_parts(jax.ShapeDtypeStruct(x.shape, jnp.float32), weight) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(parts=jnp.zeros((2, 3, 8), jnp.bfloat16)), r"must be float32 .* Got bfloat16"),
        (dict(parts=jnp.zeros((2, 4, 8))), r"\(2, 4, 8\) and \(3, 8\)"),
        (dict(weight=jnp.zeros(4)), r"`weight` must be \(8,\). Got \(4,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str):
    args = dict(parts=jnp.zeros((2, 3, 8)), residual=jnp.zeros((3, 8)), weight=jnp.zeros(8))
    # Without the shape checks that the tests put on every function.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(api.add_norm)(**args | change, eps=1e-6)
