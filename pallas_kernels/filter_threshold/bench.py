"""Times the filters' threshold: `python -m pallas_kernels.filter_threshold.bench [spec ...]`.

Prints one JSON line per spec and tile choice, the default choice first. A call includes the pass
over the blocks that the kernels need. `passes` is the time over that of reading the logits once at
4.37 TB/s, the rate measured on an H200. Every row was compared with the reference in the same run.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_main import print_rows
from pallas_kernels.filter_threshold import reference, triton
from pallas_kernels.filter_threshold.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.timing import time_configs
from pallas_kernels.vocab_blocks import block_sums

_READ_BYTES_PER_S = 4.37e12
_CALLS = 64
_TOLERANCE = 1e-3  # a token more or less by rounding, where tokens are dense


def _grid(**choices: Sequence[int]) -> list[triton.TuningConfig]:
    return [
        triton.TuningConfig(**dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


SWEEPS = {
    "flat-top-p-b256": [
        *_grid(collect_warps=(1, 2, 4), tile_blocks=(2, 4, 8)),
        *_grid(sample_pieces=(256, 1024), guess_warps=(8, 16)),
    ],
    "flat-top-p-b1": _grid(collect_warps=(1, 2, 4), num_splits=(16, 32, 64)),
    "text-like-top-p-b256": _grid(collect_warps=(1, 2, 4), tile_blocks=(2, 4, 8)),
}
"""Tile choices to try, by name of the spec."""

SPECS = tuple(spec for spec in ARG_SPECS if not spec.name.startswith("corners"))


def rows(
    device: Any, specs: Sequence[ArgSpec] = SPECS, is_sweep: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields one row per spec and tile choice."""
    with jax.default_device(device):
        for spec in specs:
            yield from _spec_rows(spec, device, SWEEPS.get(spec.name, []) if is_sweep else [])


def _spec_rows(
    spec: ArgSpec, device: Any, sweep: Sequence[triton.TuningConfig]
) -> Iterator[dict[str, Any]]:
    def op(before: jax.Array, *args: jax.Array, config: triton.TuningConfig) -> jax.Array:
        logits, *settings = args
        # A temperature of 1 that has to wait for the call before; 0 * inf would be NaN.
        temperature = 1 + 0 * jnp.nan_to_num(before, neginf=0.0)
        sums = block_sums(logits, temperature, implementation="triton")
        return triton.filter_threshold(logits, *settings, sums=sums, config=config)

    args = spec.arrays(0)
    default = triton.TuningConfig()
    num_bytes = 4 * args[0].size
    for timing in time_configs(
        op,
        [default, *(config for config in sweep if config != default)],
        jnp.zeros(spec.num_rows),
        args,
        [()] * 4,
        num_rounds=_CALLS // 4,
        want=reference.filter_threshold(*args),
    ):
        yield {
            "op": "filter_threshold",
            "spec": spec.name,
            "is_default": timing.config == default,
            "us": round(timing.seconds * 1e6, 2),
            "passes": round(timing.seconds * _READ_BYTES_PER_S / num_bytes, 2),
            "is_correct": timing.error <= _TOLERANCE,
            "error": timing.error,
            "failure": timing.failure,
            "config": dataclasses.asdict(timing.config),
            "device": device.device_kind,
            "jax": jax.__version__,
        }


if __name__ == "__main__":
    print_rows(__doc__, SPECS, rows)
