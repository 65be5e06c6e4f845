"""One suite for every backend of the weight product with its neighbours."""

import functools
import inspect
import secrets
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Implementation
from pallas_kernels.fused_linear import api, jax_triton, mosaic, tuning
from pallas_kernels.fused_linear.arg_specs import ARG_SPECS, MANY_ROWS_SPECS, ArgSpec
from tests.pallas_kernels.oracle import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

SMALL_SPECS = [spec for spec in ARG_SPECS if spec.depth * spec.num_columns < 1 << 16]


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


def run(spec: ArgSpec, implementation: Implementation, args: dict[str, jax.Array]) -> jax.Array:
    return api.fused_linear(**args, **spec.options, implementation=implementation)


def expected(spec: ArgSpec, args: dict[str, jax.Array]) -> np.ndarray:
    """The definition, in float64."""
    given = {name: np.asarray(array, np.float64) for name, array in args.items()}
    x = given["x"]
    if spec.has_norm:
        rms = np.sqrt((x**2).mean(axis=1, keepdims=True) + spec.options["eps"])
        x = x / rms * given["norm_weight"]
    out = x @ given["weight"].T + given.get("bias", 0)
    if spec.is_gated:
        gate, up = np.split(out, 2, axis=1)
        out = gate / (1 + np.exp(-gate)) * up
    return out + given.get("residual", 0)


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_reference_is_the_definition(spec: ArgSpec, seed: int):
    args = spec.arrays(jnp.float32, seed)
    assert_close(run(spec, "reference", args), expected(spec, args))


@pytest.mark.parametrize("name", ["odd-m3", "plain-m2", "all-m1", "odd-m70"])
def test_interpreted_triton_is_the_definition(name: str, seed: int):
    (spec,) = [spec for spec in ARG_SPECS if spec.name == name]
    args = spec.arrays(jnp.bfloat16, seed)
    got = run(spec, "triton_interpret", args)
    assert got.dtype == jnp.bfloat16
    assert_close(got, expected(spec, args))


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "jax_triton"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_kernel_is_the_definition(
    spec: ArgSpec, dtype: jnp.dtype, implementation: Implementation, seed: int
):
    if implementation == "jax_triton":
        pytest.importorskip("jax_triton")
        if spec.num_rows > tuning.MAX_ROWS:
            pytest.skip("the row kernel alone is written in Triton's own language")
    args = spec.arrays(dtype, seed)
    got = run(spec, implementation, args)
    assert_close(got, expected(spec, args))
    np.testing.assert_array_equal(got, run(spec, implementation, args))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", MANY_ROWS_SPECS, ids=lambda spec: spec.name)
def test_kernel_for_many_rows_is_the_definition(spec: ArgSpec, seed: int):
    args = spec.arrays(jnp.bfloat16, seed)
    got = run(spec, "mosaic", args)
    assert_close(got, expected(spec, args))
    np.testing.assert_array_equal(got, run(spec, "mosaic", args))


@pytest.mark.gpu
@pytest.mark.parametrize("cluster, minor, lag", [(1, 0, 0), (1, 1, 3), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize(
    "block_n, num_columns",
    [(224, 896), (192, 384), (256, 512), (128, 128), (192, 416), (96, 160)],
)
def test_kernel_for_many_rows_takes_any_tiles(
    block_n: int, num_columns: int, cluster: int, minor: int, lag: int, seed: int
):
    spec = ArgSpec(
        name="",
        num_rows=512,
        depth=320,
        num_columns=num_columns,
        has_norm=True,
        has_bias=True,
        has_residual=True,
    )
    args = spec.arrays(jnp.bfloat16, seed)
    config = tuning.ManyRowsConfig(block_n=block_n, cluster=cluster, minor=minor, lag=lag)
    got = mosaic.fused_linear(**args, config=config)
    assert_close(got, expected(spec, args))


def test_jax_triton_says_that_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    jax_triton._load.cache_clear()
    (spec,) = [spec for spec in ARG_SPECS if spec.name == "all-m1"]
    with pytest.raises(NotImplementedError, match=r"jax-triton is missing .* install"):
        run(spec, "jax_triton", spec.arrays(jnp.bfloat16, 0))


@pytest.mark.parametrize(
    "num_rows, depth, num_columns, is_gated, is_faster",
    [
        (1, 896, 9728, True, True),
        (1, 3584, 37888, True, False),
        (4, 896, 1152, False, True),
        (4, 896, 9728, True, False),
        (5, 896, 1152, False, False),
        (64, 896, 1152, False, True),
        (256, 896, 896, False, True),
        (257, 896, 896, False, False),
        (256, 4864, 896, False, False),
        (64, 896, 9728, True, False),
        (128, 896, 9728, True, True),
        (256, 896, 9728, True, True),
        (300, 896, 9728, True, False),
        (1024, 896, 9728, True, True),
        (2048, 896, 9728, True, True),
        (2049, 896, 9728, True, False),
        (8192, 3584, 37888, True, True),
        (8192, 3584, 37872, True, False),
        (8192, 896, 896, False, False),
    ],
)
def test_kernels_take_the_shapes_at_which_they_were_faster(
    num_rows: int, depth: int, num_columns: int, is_gated: bool, is_faster: bool
):
    def check(x: jax.Array, weight: jax.Array) -> None:
        assert api.is_faster(x, weight, is_gated=is_gated) == is_faster
        assert not api.is_faster(x.astype(jnp.float32), weight, is_gated=is_gated)

    shapes = (num_rows, depth), (num_columns, depth)
    jax.eval_shape(check, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))


def test_what_a_kernel_does_not_take_is_left_to_a_plain_product():
    x, weight = jnp.zeros((5, 16), jnp.bfloat16), jnp.zeros((8, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="5 rows of bfloat16"):
        api.fused_linear(x, weight, implementation="triton")
    assert api.fused_linear(x, weight).shape == (5, 8)


@pytest.mark.parametrize(
    "device, change, reason",
    [
        ("NVIDIA A100-SXM4-80GB", {}, "needs a Hopper GPU, not NVIDIA A100"),
        ("NVIDIA H200", dict(glu=jax.nn.gelu), "gated unit is jax.nn.silu here, not .*gelu"),
        ("NVIDIA H200", dict(weight=(240, 64)), "a plain product is faster"),
        ("NVIDIA H200", dict(x=(64, 64)), "a plain product is faster"),
        ("NVIDIA H200", dict(x=(2050, 64), config=tuning.ManyRowsConfig()), "multiple of the tile"),
    ],
)
def test_kernel_for_many_rows_says_what_it_does_not_take(
    device: str, change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(mosaic, "_device", lambda: mosaic._Device(device, 132))
    call = dict(x=(2048, 64), weight=(256, 64), glu=jax.nn.silu) | change
    x, weight = (jax.ShapeDtypeStruct(call.pop(name), jnp.bfloat16) for name in ("x", "weight"))
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(functools.partial(mosaic.fused_linear, **call), x, weight)


@pytest.mark.parametrize(
    "rows, columns, block_n, cluster",
    [(128, 9728, 96, 1), (256, 9728, 160, 2), (384, 9728, 256, 1), (256, 37888, 192, 2)],
)
def test_hundreds_of_rows_get_the_tiles_that_are_over_first(
    rows: int, columns: int, block_n: int, cluster: int
):
    def check(x: jax.Array, weight: jax.Array) -> None:
        config = tuning.find_config(x, weight, is_gated=True)
        assert isinstance(config, tuning.ManyRowsConfig)
        assert (config.block_n, config.cluster) == (block_n, cluster)

    shapes = (rows, 896), (columns, 896)
    jax.eval_shape(check, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))


@pytest.mark.parametrize(
    "implementation, is_it", [(None, True), ("mosaic", True), ("triton", False)]
)
def test_many_rows_are_for_the_kernel_that_takes_them(implementation: Any, is_it: bool):
    def check(x: jax.Array, weight: jax.Array) -> None:
        got = api.is_faster(x, weight, is_gated=True, implementation=implementation)
        assert got == is_it

    shapes = (2048, 896), (9728, 896)
    jax.eval_shape(check, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=jnp.zeros((12, 8))), r"Got the shapes \(2, 16\) and \(12, 8\)"),
        (dict(weight=jnp.zeros((13, 16)), glu=jax.nn.silu), "even in number. Got 13"),
        (dict(bias=jnp.zeros(6)), r"`bias` must have the shape \(12,\). Got \(6,\)"),
        (dict(norm_weight=jnp.zeros(12)), r"`norm_weight` must have the shape \(16,\)"),
        (dict(residual=jnp.zeros((2, 12)), glu=jax.nn.silu), r"`residual` .* shape \(2, 6\)"),
        (dict(weight=jnp.zeros((12, 16), jnp.bfloat16)), r"\['bfloat16', 'float32'\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str):
    args = dict(x=jnp.zeros((2, 16)), weight=jnp.zeros((12, 16))) | change
    # Without the shape checks that the tests put on every function.
    op = inspect.unwrap(api.fused_linear)
    with pytest.raises(ValueError, match=message):
        op(**args)


PARTS = [
    (16, 4864, 896, 8),
    (64, 4864, 896, 4),
    (128, 4864, 896, 4),
    (5, 160, 70, 2),
    (40, 600, 64, 3),
]


def assert_parts(implementation: Implementation, rows: int, depth: int, columns: int, parts: int):
    spec = ArgSpec(name="", num_rows=rows, depth=depth, num_columns=columns)
    args = spec.arrays(jnp.bfloat16, secrets.randbelow(1 << 30))
    run_parts = functools.partial(api.product_parts, **args, num_parts=parts)
    got = run_parts(implementation=implementation)
    assert got.dtype == jnp.float32
    x, weight = (np.asarray(args[name], np.float64) for name in ("x", "weight"))
    want = np.einsum("msk,nsk->smn", x.reshape(rows, parts, -1), weight.reshape(columns, parts, -1))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got, run_parts(implementation=implementation))


@pytest.mark.parametrize("implementation", ["reference", "triton_interpret"])
@pytest.mark.parametrize("rows, depth, columns, parts", PARTS[3:])
def test_parts_are_products_of_parts_of_the_depth(
    rows: int, depth: int, columns: int, parts: int, implementation: Implementation
):
    assert_parts(implementation, rows, depth, columns, parts)


@pytest.mark.gpu
@pytest.mark.parametrize("rows, depth, columns, parts", PARTS)
def test_parts_on_a_gpu_are_products_of_parts_of_the_depth(
    rows: int, depth: int, columns: int, parts: int
):
    assert_parts("triton", rows, depth, columns, parts)


def test_a_depth_that_parts_do_not_divide_is_refused():
    x, weight = jnp.zeros((2, 10), jnp.bfloat16), jnp.zeros((4, 10), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"`num_parts` divides. Got \(2, 10\), \(4, 10\) and 3"):
        api.product_parts(x, weight, num_parts=3)
