"""The kernels compile for real GPUs, at every shape we name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.paged_decode_attention import arg_specs as decode_specs
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.ragged_prefill_attention import arg_specs as prefill_specs
from pallas_kernels.ragged_prefill_attention.api import ragged_prefill_attention
from tests import deviceless

pytestmark = pytest.mark.deviceless

TRITON_CALL = 'custom_call_target="__gpu$xla.gpu.triton"'

Spec = decode_specs.ArgSpec | prefill_specs.ArgSpec
CASES = [(paged_decode_attention, spec) for spec in decode_specs.ARG_SPECS]
CASES += [(ragged_prefill_attention, spec) for spec in prefill_specs.ARG_SPECS]
# One of each kind of kernel that comes out; the rest is for the nightly run.
QUICK = (
    "qwen2.5-0.5b-b1",
    "qwen2.5-0.5b-b512",
    "qwen2.5-0.5b-b16-wide",
    "qwen2.5-7b-b128",
    "multi-query-b2",
    "qwen2.5-0.5b-8x1024",
    "qwen2.5-7b-4x1024",
    "small-heads",
)
QUICK_CASES = [case for case in CASES if case[1].name in QUICK]


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Spec) else None


def assert_compiles(target: str, op: Callable[..., jax.Array], spec: Spec, dtype: Any):
    args = [deviceless.arg(x.shape, x.dtype, target) for x in spec.shapes(dtype)]

    def attention(*args: jax.Array) -> jax.Array:
        return op(*args, scale=spec.heads.scale, implementation="triton")

    compiled = deviceless.compile_for(target, attention, *args)
    assert TRITON_CALL in str(compiled.as_text())
    assert not deviceless.large_copies(compiled)


@pytest.mark.parametrize("op, spec", QUICK_CASES, ids=name_of)
def test_kernel_compiles_for_h200(op: Callable[..., jax.Array], spec: Spec):
    assert_compiles("h200", op, spec, jnp.bfloat16)


@pytest.mark.parametrize("op, spec", QUICK_CASES[:1] + QUICK_CASES[-1:], ids=name_of)
def test_kernel_compiles_for_h200_in_float32(op: Callable[..., jax.Array], spec: Spec):
    assert_compiles("h200", op, spec, jnp.float32)


@pytest.mark.parametrize("op, spec", QUICK_CASES[:1] + QUICK_CASES[-1:], ids=name_of)
def test_kernel_compiles_for_a100(op: Callable[..., jax.Array], spec: Spec):
    assert_compiles("a100", op, spec, jnp.bfloat16)


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("op, spec", CASES, ids=name_of)
def test_kernel_compiles_at_every_spec(
    op: Callable[..., jax.Array], spec: Spec, dtype: jnp.dtype, target: str
):
    assert_compiles(target, op, spec, dtype)


def test_kernels_of_equal_layers_are_traced_and_compiled_once():
    spec = decode_specs.ARG_SPECS[0]
    q, kv_pages, page_table, kv_lens = (
        deviceless.arg(x.shape, x.dtype) for x in spec.shapes(jnp.bfloat16)
    )

    def layers(
        q: jax.Array, caches: list[jax.Array], page_table: jax.Array, kv_lens: jax.Array
    ) -> jax.Array:
        for cache in caches:
            q = paged_decode_attention(
                q, cache, page_table, kv_lens, scale=spec.heads.scale, implementation="triton"
            )
        return q

    compiled = deviceless.compile_for_h200(layers, q, [kv_pages] * 8, page_table, kv_lens)
    assert str(compiled.as_text()).count(TRITON_CALL) == 2 * 8  # attention and combine
