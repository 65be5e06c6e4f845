"""Times ragged prefill: `python -m pallas_kernels.ragged_prefill_attention.bench [spec ...]`.

Prints one JSON line per spec and tile choice, the default choice first. `tflop_per_s` counts the
visible scores alone. Every row was compared with the reference in the same run.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_main import print_rows
from pallas_kernels.ragged_prefill_attention import reference, triton
from pallas_kernels.ragged_prefill_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.timing import time_configs

_DTYPE = jnp.dtype(jnp.bfloat16)
_CALLS_PER_ROUND = 8
_NUM_ROUNDS = 16
_TOLERANCE = 1e-2


def _grid(**choices: Sequence[int]) -> list[triton.TuningConfig]:
    return [
        triton.TuningConfig(**dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


_TILES = [
    *_grid(block_rows=(64,), block_kv=(32, 64, 128), num_warps=(4,), num_stages=(2, 3)),
    *_grid(block_rows=(128,), block_kv=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4)),
    *_grid(block_rows=(256,), block_kv=(64,), num_warps=(8,), num_stages=(2, 3)),
]
SWEEPS = {
    "qwen2.5-0.5b-8x1024": _TILES,
    "qwen2.5-0.5b-ragged": _grid(block_rows=(64, 128), num_warps=(4, 8)),
    "qwen2.5-0.5b-1x1024": _grid(block_rows=(64, 128), block_kv=(32, 64), num_warps=(4, 8)),
    "qwen2.5-0.5b-1x32": _grid(block_rows=(16, 32, 64, 128), block_kv=(32, 64)),
    "qwen2.5-7b-4x1024": _grid(
        block_rows=(64, 128), block_kv=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)
    ),
}
"""Tile choices to try, by name of the spec."""


def rows(
    device: Any, specs: Sequence[ArgSpec] = ARG_SPECS, is_sweep: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields one row per spec and tile choice."""
    with jax.default_device(device):
        for spec in specs:
            yield from _spec_rows(spec, device, SWEEPS.get(spec.name, []) if is_sweep else [])


def _spec_rows(
    spec: ArgSpec, device: Any, sweep: Sequence[triton.TuningConfig]
) -> Iterator[dict[str, Any]]:
    q, *args = spec.arrays(_DTYPE, seed=0)
    default = triton.default_config(q, spec.heads.num_kv_heads)
    for timing in time_configs(
        functools.partial(triton.ragged_prefill_attention, scale=spec.heads.scale),
        [default, *(config for config in sweep if config != default)],
        q,
        tuple(args),
        [()] * _CALLS_PER_ROUND,
        num_rounds=_NUM_ROUNDS,
        want=reference.ragged_prefill_attention(q, *args, scale=spec.heads.scale),
    ):
        yield {
            "op": "ragged_prefill_attention",
            "spec": spec.name,
            "is_default": timing.config == default,
            "us": round(timing.seconds * 1e6, 2),
            "tflop_per_s": round(spec.flops / timing.seconds / 1e12, 1),
            "is_correct": timing.error <= _TOLERANCE,
            "error": timing.error,
            "failure": timing.failure,
            "config": dataclasses.asdict(timing.config),
            "dtype": _DTYPE.name,
            "device": device.device_kind,
            "jax": jax.__version__,
        }


if __name__ == "__main__":
    print_rows(__doc__, ARG_SPECS, rows)
