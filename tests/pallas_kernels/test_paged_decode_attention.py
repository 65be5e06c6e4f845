"""One suite for every backend of paged decode attention."""

import inspect
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Implementation
from pallas_kernels.paged_decode_attention import api, triton, tuning
from pallas_kernels.paged_decode_attention.arg_specs import ARG_SPECS, ArgSpec
from tests.pallas_kernels import oracle

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

SMALL_SPECS = [spec for spec in ARG_SPECS if spec.is_small]
INTERPRETED = ("grouped-b6-dead-and-single", "multi-query-b2", "small-heads-b2")


def spec_named(name: str) -> ArgSpec:
    return next(spec for spec in ARG_SPECS if spec.name == name)


type Result = tuple[jax.Array, jax.Array]


def run(spec: ArgSpec, implementation: Implementation, args: tuple[jax.Array, ...]) -> Result:
    return api.paged_decode_attention(*args, scale=spec.heads.scale, implementation=implementation)


def assert_same(got: Result, want: tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]):
    """What was found, and every place of the cache but those of the null page."""
    oracle.assert_close(got[0], want[0])
    oracle.assert_close(got[1][1:], want[1][1:], equal_nan=True)


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_reference_matches_oracle(spec: ArgSpec, seed: int):
    args = spec.arrays(jnp.float32, seed)
    want = oracle.paged_decode_attention(*args, scale=spec.heads.scale)
    assert_same(run(spec, "reference", args), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_reference_accumulates_in_float32(dtype: jnp.dtype, seed: int):
    spec = spec_named("multi-head-b4-odd")
    args = spec.arrays(dtype, seed)
    got = run(spec, "reference", args)
    assert got[0].dtype == got[1].dtype == dtype
    assert_same(got, oracle.paged_decode_attention(*args, scale=spec.heads.scale))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_triton_matches_reference(name: str, seed: int):
    spec = spec_named(name)
    args = spec.arrays(jnp.float32, seed)
    assert_same(run(spec, "triton_interpret", args), run(spec, "reference", args))


@pytest.mark.parametrize("num_splits, min_split_tiles", [(1, 1), (4, 1), (4, 2)])
def test_splits_do_not_change_the_result(num_splits: int, min_split_tiles: int, seed: int):
    spec = spec_named("multi-head-b4-odd")
    args = spec.arrays(jnp.float32, seed)
    config = tuning.TuningConfig(
        block_kv=16, num_splits=num_splits, min_split_tiles=min_split_tiles
    )
    got = triton.paged_decode_attention(
        *args, scale=spec.heads.scale, config=config, interpret=True
    )
    assert_same(got, run(spec, "reference", args))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_triton_matches_reference(spec: ArgSpec, seed: int):
    args = spec.arrays(jnp.bfloat16, seed)
    assert_same(run(spec, "triton", args), run(spec, "reference", args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_triton_matches_reference_in_other_dtypes(spec: ArgSpec, dtype: jnp.dtype, seed: int):
    args = spec.arrays(dtype, seed)
    assert_same(run(spec, "triton", args), run(spec, "reference", args))


@pytest.mark.gpu
@pytest.mark.parametrize("num_splits", [1, 2, 16, 64])
def test_triton_splits_do_not_change_the_result(num_splits: int, seed: int):
    spec = spec_named("qwen2.5-32b-b16")
    args = spec.arrays(jnp.bfloat16, seed)
    config = tuning.TuningConfig(block_kv=32, num_splits=num_splits, min_split_tiles=1)
    got = triton.paged_decode_attention(*args, scale=spec.heads.scale, config=config)
    assert_same(got, run(spec, "reference", args))


def test_splits_fill_the_gpu_at_a_small_batch_only():
    config = tuning.TuningConfig(target_programs=1056, min_split_tiles=2, block_kv=64)

    def splits(batch: int, max_tokens: int) -> int:
        return tuning.choose_num_splits(config, batch, 2, max_tokens)

    assert splits(1, 1024) == 8  # 128 tokens at least
    assert splits(1, 131_072) == 64
    assert splits(64, 131_072) == 8
    assert splits(128, 131_072) == 4
    assert splits(256, 131_072) == 1
    assert splits(1, 16) == 1


@pytest.mark.gpu
def test_the_same_call_gives_the_same_bits():
    spec = spec_named("qwen2.5-32b-b16")
    args = spec.arrays(jnp.bfloat16, 0)
    first = run(spec, "triton", args)[0]
    for _ in range(20):  # splits arrive in another order each time
        np.testing.assert_array_equal(first, run(spec, "triton", args)[0])


def test_scale_is_applied_in_float32():
    args = spec_named("demo-b3").arrays(jnp.bfloat16, 0)
    got = api.paged_decode_attention(*args, scale=0.3)
    assert_same(got, oracle.paged_decode_attention(*args, scale=0.3))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=jnp.zeros((3, 4))), "`q` must have 3 axes"),
        (dict(q=jnp.zeros((3, 4, 32))), "the same head_dim. Got 32 and 64"),
        (dict(q=jnp.zeros((3, 5, 64))), "a multiple of the kv heads"),
        (dict(q=jnp.zeros((3, 4, 64), jnp.bfloat16)), "Got bfloat16 and float32"),
        (dict(k=jnp.zeros((3, 4, 64))), r"`k` must be float32 of the shape \(3, 2, 64\)"),
        (dict(v=jnp.zeros((3, 2, 64), jnp.bfloat16)), "`v` must be float32 .* Got bfloat16"),
        (dict(cos=jnp.zeros((3, 64))), r"`cos` must be float32 of the shape \(3, 32\)"),
        (dict(kv_pages=jnp.zeros((9, 2, 16, 64))), "`kv_pages` must have the shape"),
        (dict(page_table=jnp.zeros((2, 4), jnp.int32)), r"of the shape \(3, any\)"),
        (dict(kv_lens=jnp.zeros(3, jnp.uint32)), "`kv_lens` must be int32"),
        (dict(scale=0.0), "`scale` must be above 0"),
        (dict(implementation="cuda"), "must be one of .* Got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str):
    spec = spec_named("demo-b3")
    names = ("q", "k", "v", "cos", "sin", "kv_pages", "page_table", "kv_lens")
    args = dict(zip(names, spec.arrays(jnp.float32, 0), strict=True)) | dict(scale=spec.heads.scale)
    # Without the shape checks that the tests put on every function.
    op = inspect.unwrap(api.paged_decode_attention)
    with pytest.raises(ValueError, match=message):
        op(**(args | change))


def test_explicit_triton_refuses_what_it_cannot_serve():
    args = (
        jnp.zeros((1, 2, 80)),
        *[jnp.zeros((1, 1, 80))] * 2,
        *[jnp.zeros((1, 40))] * 2,
        jnp.zeros((2, 2, 1, 16, 80)),
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones(1, jnp.int32),
    )
    with pytest.raises(NotImplementedError, match="head_dim 80"):
        api.paged_decode_attention(*args, scale=1.0, implementation="triton")
    out, _ = api.paged_decode_attention(*args, scale=1.0)
    np.testing.assert_array_equal(out, 0.0)
