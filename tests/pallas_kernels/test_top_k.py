"""One suite for every backend of the largest entries of short rows."""

import inspect
import secrets

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Implementation
from pallas_kernels.top_k import api
from pallas_kernels.top_k.arg_specs import ARG_SPECS, ArgSpec


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


def run(spec: ArgSpec, implementation: Implementation, seed: int):
    x = np.asarray(spec.array(seed))
    values, places = api.top_k(jnp.asarray(x), count=spec.count, implementation=implementation)
    want = np.argsort(-x, axis=-1, kind="stable")[:, : spec.count]
    np.testing.assert_array_equal(places, want)
    np.testing.assert_array_equal(values, np.take_along_axis(x, want, axis=-1))


@pytest.mark.parametrize("implementation", ["reference", "triton_interpret"])
@pytest.mark.parametrize("spec", [s for s in ARG_SPECS if s.is_small], ids=lambda spec: spec.name)
def test_finds_what_a_stable_sort_finds(spec: ArgSpec, implementation: Implementation, seed: int):
    run(spec, implementation, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_triton_finds_what_a_stable_sort_finds(spec: ArgSpec, seed: int):
    run(spec, "triton", seed)


def test_arguments_that_do_not_fit_are_refused():
    # Without the shape checks that the tests put on every function.
    op = inspect.unwrap(api.top_k)
    with pytest.raises(ValueError, match=r"`count` must be 1 to 8, .* Got 9"):
        op(jnp.zeros((2, 8)), count=9)
    with pytest.raises(ValueError, match="`x` must be float32"):
        op(jnp.zeros((2, 8), jnp.int32), count=2)
    with pytest.raises(NotImplementedError, match="a row of 9000 is longer than 8192"):
        op(jnp.zeros((1, 9000)), count=2, implementation="triton")
