"""One suite for every backend of rotation and write."""

import inspect
import secrets

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Implementation
from pallas_kernels.rotate_and_write import api
from pallas_kernels.rotate_and_write.arg_specs import ARG_SPECS, ArgSpec
from tests.pallas_kernels import oracle

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

SMALL_SPECS = [spec for spec in ARG_SPECS if spec.num_tokens <= 70]


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


def assert_is_the_definition(
    spec: ArgSpec, implementation: Implementation, dtype: jnp.dtype, seed: int
):
    args = spec.arrays(dtype, seed)
    out, cache = api.rotate_and_write(*args, implementation=implementation)
    q, k, v, cos, sin, want, pages, offsets = (np.asarray(x, np.float64) for x in args)
    oracle.assert_close(out, oracle.rotate(q, cos, sin))
    keys, want = oracle.rotate(k, cos, sin), want.copy()
    for token in range(spec.num_tokens - spec.num_padding):
        where = int(pages[token]), slice(None), slice(None), int(offsets[token])
        want[where] = np.stack([keys[token], v[token]])
    # The null page holds anything; every other place that no token went to is as it was.
    oracle.assert_close(cache[1:], want[1:], equal_nan=True)


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_reference_is_the_definition(spec: ArgSpec, seed: int):
    assert_is_the_definition(spec, "reference", jnp.dtype(jnp.float32), seed)


@pytest.mark.parametrize("name", ["demo-t50", "multi-query-t1", "small-heads-t70"])
def test_interpreted_triton_is_the_definition(name: str, seed: int):
    (spec,) = [spec for spec in ARG_SPECS if spec.name == name]
    assert_is_the_definition(spec, "triton_interpret", jnp.dtype(jnp.float32), seed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_triton_is_the_definition(spec: ArgSpec, dtype: jnp.dtype, seed: int):
    assert_is_the_definition(spec, "triton", jnp.dtype(dtype), seed)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("write_pages", (3,), r"`write_pages` must be int32 of the shape \(50\)"),
        ("write_offsets", (50, 1), r"`write_offsets` must be int32"),
        ("cos", (50, 2), r"`cos` must be float32"),
        ("v", (50, 1, 4), r"`v` must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str):
    (spec,) = [spec for spec in ARG_SPECS if spec.name == "demo-t50"]
    # Without the shape checks that the tests put on every function.
    op = inspect.unwrap(api.rotate_and_write)
    args = dict(zip(inspect.signature(op).parameters, spec.arrays(jnp.float32, 0), strict=False))
    args[name] = jnp.zeros(shape, args[name].dtype)
    with pytest.raises(ValueError, match=message):
        op(**args)


def test_explicit_choice_of_an_unknown_implementation_is_refused():
    args = ARG_SPECS[3].arrays(jnp.float32, 0)
    with pytest.raises(ValueError, match="`implementation` of rotate_and_write must be one of"):
        inspect.unwrap(api.rotate_and_write)(*args, implementation="cuda")
