"""The kernels compile for real GPUs, at every shape we name."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.add_norm import arg_specs as add_norm_specs
from pallas_kernels.add_norm.api import add_norm
from pallas_kernels.filter_threshold import arg_specs as filter_specs
from pallas_kernels.filter_threshold.api import filter_threshold
from pallas_kernels.fused_linear import arg_specs as linear_specs
from pallas_kernels.fused_linear import mosaic, tuning
from pallas_kernels.fused_linear.api import fused_linear, product_parts
from pallas_kernels.paged_decode_attention import arg_specs as decode_specs
from pallas_kernels.paged_decode_attention.api import paged_decode_attention
from pallas_kernels.ragged_prefill_attention import arg_specs as prefill_specs
from pallas_kernels.ragged_prefill_attention.api import ragged_prefill_attention
from pallas_kernels.rotate_and_write import arg_specs as write_specs
from pallas_kernels.rotate_and_write.api import rotate_and_write
from pallas_kernels.top_k import arg_specs as top_k_specs
from pallas_kernels.top_k.api import top_k
from pallas_kernels.vocab_blocks import reference as blocks_by_xla
from pallas_kernels.vocab_blocks.api import block_sums, kept_sums
from tests import deviceless

pytestmark = pytest.mark.deviceless

TRITON_CALL = 'custom_call_target="__gpu$xla.gpu.triton"'

Spec = (
    decode_specs.ArgSpec
    | prefill_specs.ArgSpec
    | linear_specs.ArgSpec
    | write_specs.ArgSpec
    | add_norm_specs.ArgSpec
)
CASES = [(paged_decode_attention, spec) for spec in decode_specs.ARG_SPECS]
CASES += [(ragged_prefill_attention, spec) for spec in prefill_specs.ARG_SPECS]
CASES += [(fused_linear, spec) for spec in linear_specs.ARG_SPECS]
CASES += [(rotate_and_write, spec) for spec in write_specs.ARG_SPECS]
CASES += [(add_norm, spec) for spec in add_norm_specs.ARG_SPECS]
# One of each kind of kernel that comes out; the rest is for the nightly run.
QUICK = (
    "qwen2.5-0.5b-b1",
    "qwen2.5-0.5b-b512",
    "qwen2.5-0.5b-b16-wide",
    "qwen2.5-7b-b128",
    "multi-query-b2",
    "qwen2.5-0.5b-gate-up-m1",
    "qwen2.5-0.5b-down-m4",
    "qwen2.5-0.5b-out-m256",
    "qwen2.5-0.5b-m256",
    "qwen2.5-0.5b-8x1024",
    "qwen2.5-7b-4x1024",
    "qwen2.5-0.5b-t8192",
    "small-heads",
)
QUICK_CASES = [case for case in CASES if case[1].name in QUICK]
HAS_FLOAT32 = [case for case in CASES if case[0] is not fused_linear]
EDGE_CASES = [case for case in QUICK_CASES if case[1].name in (QUICK[0], QUICK[5], QUICK[-1])]


def name_of(value: object) -> str | None:
    return value.name if isinstance(value, Spec) else None


def assert_compiles(target: str, op: Callable[..., Any], spec: Spec, dtype: Any):
    def on_target(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return deviceless.arg(x.shape, x.dtype, target)

    shapes = jax.tree.map(on_target, spec.shapes(dtype))
    if isinstance(spec, linear_specs.ArgSpec | add_norm_specs.ArgSpec):
        compiled = deviceless.compile_for(
            target, lambda args: op(**args, **spec.options, implementation="triton"), shapes
        )
    else:
        # A cache that is written is given away, as the engine does: then nothing may copy it.
        is_written = op is not ragged_prefill_attention
        options = {} if op is rotate_and_write else dict(scale=spec.heads.scale)
        compiled = deviceless.compile_for(
            target,
            lambda *args: op(*args, **options, implementation="triton"),
            *shapes,
            donate_argnums=[i for i, x in enumerate(shapes) if is_written and len(x.shape) == 5],
        )
    assert str(compiled.as_text()).count(TRITON_CALL) == 1
    assert not deviceless.large_copies(compiled)


@pytest.mark.parametrize("op, spec", QUICK_CASES, ids=name_of)
def test_kernel_compiles_for_h200(op: Callable[..., Any], spec: Spec):
    assert_compiles("h200", op, spec, jnp.bfloat16)


@pytest.mark.parametrize(
    "op, spec", [case for case in EDGE_CASES if case in HAS_FLOAT32], ids=name_of
)
def test_kernel_compiles_for_h200_in_float32(op: Callable[..., Any], spec: Spec):
    assert_compiles("h200", op, spec, jnp.float32)


@pytest.mark.parametrize("num_rows", [16, 64, 128])
def test_product_in_parts_compiles_for_h200(num_rows: int):
    x, weight = (deviceless.arg(shape, jnp.bfloat16) for shape in ((num_rows, 4864), (896, 4864)))
    parts = functools.partial(product_parts, num_parts=4, implementation="triton")
    compiled = deviceless.compile_for("h200", parts, x, weight)
    assert str(compiled.as_text()).count(TRITON_CALL) == 1


@pytest.mark.parametrize("op, spec", EDGE_CASES, ids=name_of)
def test_kernel_compiles_for_a100(op: Callable[..., Any], spec: Spec):
    assert_compiles("a100", op, spec, jnp.bfloat16)


@pytest.mark.nightly
@pytest.mark.parametrize("target", ["h200", "a100"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("op, spec", CASES, ids=name_of)
def test_kernel_compiles_at_every_spec(
    op: Callable[..., Any], spec: Spec, dtype: jnp.dtype, target: str
):
    if dtype != jnp.float32 or (op, spec) in HAS_FLOAT32:
        assert_compiles(target, op, spec, dtype)


@pytest.mark.parametrize("spec", linear_specs.MANY_ROWS_SPECS, ids=name_of)
def test_kernel_for_many_rows_compiles_for_h200(
    spec: linear_specs.ArgSpec, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    args = jax.tree.map(lambda x: deviceless.arg(x.shape, x.dtype), spec.shapes(jnp.bfloat16))
    compiled = deviceless.compile_for_h200(lambda args: fused_linear(**args, **spec.options), args)
    assert str(compiled.as_text()).count('custom_call_target="mosaic_gpu_v2"') == 1
    assert not deviceless.large_copies(compiled)


@pytest.mark.parametrize("block_n, num_columns", [(192, 416), (96, 160)])
def test_kernel_for_many_rows_compiles_where_the_last_tile_is_not_whole(
    block_n: int, num_columns: int
):
    config = tuning.ManyRowsConfig(block_n=block_n)
    x, weight = (deviceless.arg((n, 320), jnp.bfloat16) for n in (512, num_columns))
    compiled = deviceless.compile_for_h200(
        lambda x, weight: mosaic.fused_linear(x, weight, config=config), x, weight
    )
    assert str(compiled.as_text()).count('custom_call_target="mosaic_gpu_v2"') == 1


def test_the_product_compiles_through_jax_triton():
    pytest.importorskip("jax_triton")
    (spec,) = [spec for spec in linear_specs.ARG_SPECS if spec.name == "all-m1"]
    args = jax.tree.map(lambda x: deviceless.arg(x.shape, x.dtype), spec.shapes(jnp.bfloat16))
    compiled = deviceless.compile_for_h200(
        lambda args: fused_linear(**args, **spec.options, implementation="jax_triton"), args
    )
    assert 'custom_call_target="triton_kernel_call_ffi"' in str(compiled.as_text())


def test_kernels_of_equal_layers_are_traced_and_compiled_once():
    spec = decode_specs.ARG_SPECS[0]
    args = [deviceless.arg(x.shape, x.dtype) for x in spec.shapes(jnp.bfloat16)]

    def layers(
        q: jax.Array,
        caches: list[jax.Array],
        k: jax.Array,
        v: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        page_table: jax.Array,
        kv_lens: jax.Array,
    ) -> Any:
        written = []
        for cache in caches:
            q, cache = paged_decode_attention(
                q,
                k,
                v,
                cos,
                sin,
                cache,
                page_table,
                kv_lens,
                scale=spec.heads.scale,
                implementation="triton",
            )
            written.append(cache)
        return q, written

    q, *new, cache, page_table, kv_lens = args
    compiled = deviceless.compile_for_h200(
        layers, q, [cache] * 8, *new, page_table, kv_lens, donate_argnums=(1,)
    )
    assert str(compiled.as_text()).count(TRITON_CALL) == 8
    assert not deviceless.large_copies(compiled)
    kv_bytes = 8 * 2 * cache.size
    memory = compiled.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes >= kv_bytes


@pytest.mark.parametrize("target", ["h200", "a100"])
def test_kernels_of_the_sampler_compile(target: str):
    """Of the largest entries, and what a draw needs: shapes of a batch of 256."""
    (filters,) = (spec for spec in filter_specs.ARG_SPECS if spec.name == "flat-top-p-b256")
    (tops,) = (spec for spec in top_k_specs.ARG_SPECS if spec.name == "block-maxima-b256")

    def all_of_them(
        tops: jax.Array, temperature: jax.Array, logits: jax.Array, *settings: jax.Array
    ) -> Any:
        largest = top_k(tops, count=20, implementation="triton")
        sums = block_sums(logits, temperature, implementation="triton")
        lowest = filter_threshold(logits, *settings, sums=sums, implementation="triton")
        return largest, kept_sums(logits, sums, lowest, implementation="triton")

    logits, *settings = filters.shapes()
    shapes = (tops.shape(), settings[1], logits, *settings)
    args = (deviceless.arg(x.shape, x.dtype, target) for x in shapes)
    compiled = deviceless.compile_for(target, all_of_them, *args)
    assert str(compiled.as_text()).count(TRITON_CALL) == 3 + 3
    assert not deviceless.large_copies(compiled)


def test_a_reduction_that_nobody_reads_does_no_harm():
    """XLA of jax 0.11.2 died of it in a loop, where the reducer held a call."""

    def loop(x: jax.Array) -> jax.Array:
        def step(_: Any, x: jax.Array) -> jax.Array:
            blocks_by_xla._online((x,), axis=1, num_strands=4)
            return x + 1

        return jax.lax.fori_loop(0, 3, step, x)

    assert deviceless.compile_for_h200(loop, deviceless.arg((2, 1024), jnp.float32))
