"""One suite for every backend of ragged prefill attention."""

import inspect
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Implementation
from pallas_kernels.ragged_prefill_attention import api, triton
from pallas_kernels.ragged_prefill_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.ragged_prefill_attention.blocks import query_blocks
from tests.pallas_kernels import oracle

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

SMALL_SPECS = [spec for spec in ARG_SPECS if spec.is_small]
INTERPRETED = ("demo-ragged", "more-rows-than-tokens", "small-heads")


def spec_named(name: str) -> ArgSpec:
    return next(spec for spec in ARG_SPECS if spec.name == name)


def run(spec: ArgSpec, implementation: Implementation, args: tuple[jax.Array, ...]) -> jax.Array:
    return api.ragged_prefill_attention(
        *args, scale=spec.heads.scale, implementation=implementation
    )


@pytest.fixture
def seed() -> int:
    """A new one in every run; pytest prints it with a failure."""
    return secrets.randbelow(1 << 30)


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_reference_matches_oracle(spec: ArgSpec, seed: int):
    args = spec.arrays(jnp.float32, seed)
    want = oracle.ragged_prefill_attention(*args, scale=spec.heads.scale)
    oracle.assert_close(run(spec, "reference", args), want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_reference_accumulates_in_float32(dtype: jnp.dtype, seed: int):
    spec = spec_named("multi-head-odd")
    args = spec.arrays(dtype, seed)
    got = run(spec, "reference", args)
    assert got.dtype == dtype
    oracle.assert_close(got, oracle.ragged_prefill_attention(*args, scale=spec.heads.scale))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_triton_matches_reference(name: str, seed: int):
    spec = spec_named(name)
    args = spec.arrays(jnp.float32, seed)
    oracle.assert_close(run(spec, "triton_interpret", args), run(spec, "reference", args))


@pytest.mark.parametrize("block_rows, block_kv", [(16, 32), (32, 16)])
def test_tiles_do_not_change_the_result(block_rows: int, block_kv: int, seed: int):
    spec = spec_named("grouped-odd")
    args = spec.arrays(jnp.float32, seed)
    config = triton.TuningConfig(block_rows=block_rows, block_kv=block_kv)
    got = triton.ragged_prefill_attention(
        *args, scale=spec.heads.scale, config=config, interpret=True
    )
    oracle.assert_close(got, run(spec, "reference", args))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ARG_SPECS, ids=lambda spec: spec.name)
def test_triton_matches_reference(spec: ArgSpec, seed: int):
    args = spec.arrays(jnp.bfloat16, seed)
    oracle.assert_close(run(spec, "triton", args), run(spec, "reference", args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_triton_matches_reference_in_other_dtypes(spec: ArgSpec, dtype: jnp.dtype, seed: int):
    args = spec.arrays(dtype, seed)
    oracle.assert_close(run(spec, "triton", args), run(spec, "reference", args))


def test_query_blocks_cover_every_token_once():
    q_starts = jnp.asarray([0, 6, 6, 7], jnp.int32)
    blocks = query_blocks(q_starts, jnp.asarray([10, 3, 1], jnp.int32), 9, block_q=4)
    np.testing.assert_array_equal(blocks.row, [0, 0, 2, 2, 2, 2])
    np.testing.assert_array_equal(blocks.begin, [0, 4, 6, 7, 0, 0])
    np.testing.assert_array_equal(blocks.end, [4, 6, 7, 9, 0, 0])
    np.testing.assert_array_equal(blocks.kv_end, [8, 10, 1, 0, 0, 0])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=jnp.zeros((32, 4))), "`q` must have 3 axes"),
        (dict(q=jnp.zeros((32, 3, 64))), "a multiple of the kv heads"),
        (dict(page_table=jnp.zeros((4, 4))), "`page_table` must be int32"),
        (dict(q_starts=jnp.zeros(4, jnp.int32)), r"`q_starts` .* \(5\). Got int32 of \(4,\)"),
        (dict(kv_lens=jnp.zeros(5, jnp.int32)), r"`kv_lens` .* \(4\). Got int32 of \(5,\)"),
        (dict(scale=-1.0), "`scale` must be above 0"),
        (dict(implementation="mosaic"), "must be one of .* Got 'mosaic'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str):
    spec = spec_named("demo-ragged")
    names = ("q", "kv_pages", "page_table", "q_starts", "kv_lens")
    args = dict(zip(names, spec.arrays(jnp.float32, 0), strict=True)) | dict(scale=spec.heads.scale)
    # Without the shape checks that the tests put on every function.
    op = inspect.unwrap(api.ragged_prefill_attention)
    with pytest.raises(ValueError, match=message):
        op(**(args | change))


def test_explicit_triton_refuses_what_it_cannot_serve():
    spec = spec_named("demo-ragged")
    q, kv_pages, *rest = spec.arrays(jnp.float32, 0)
    with pytest.raises(NotImplementedError, match="head_dim 48"):
        api.ragged_prefill_attention(
            q[..., :48], kv_pages[..., :48], *rest, scale=1.0, implementation="triton"
        )
