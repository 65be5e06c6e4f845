"""Times the largest entries: `python -m pallas_kernels.top_k.bench [spec ...]`.

Prints one JSON line per spec and number of warps, the default choice first. Every row was compared
with the reference in the same run.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_main import print_rows
from pallas_kernels.timing import time_configs
from pallas_kernels.top_k import reference, triton
from pallas_kernels.top_k.arg_specs import ARG_SPECS, ArgSpec

_CALLS = 256
SPECS = tuple(spec for spec in ARG_SPECS if not spec.has_ties)  # all finite
SWEEP = [triton.TuningConfig(num_warps=n) for n in (1, 2, 4, 8)]
"""Launch parameters to try."""


def rows(
    device: Any, specs: Sequence[ArgSpec] = SPECS, is_sweep: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields one row per spec and choice."""
    with jax.default_device(device):
        for spec in specs:
            yield from _spec_rows(spec, device, SWEEP if is_sweep else [])


def _spec_rows(
    spec: ArgSpec, device: Any, sweep: Sequence[triton.TuningConfig]
) -> Iterator[dict[str, Any]]:
    def op(x: jax.Array, *, config: triton.TuningConfig) -> jax.Array:
        values, places = triton.top_k(x, count=spec.count, config=config)
        return _with_result(x, values, places)

    x = spec.array(0)
    default = triton.TuningConfig()
    for timing in time_configs(
        op,
        [default, *(config for config in sweep if config != default)],
        x,
        (),
        [()] * 8,
        num_rounds=_CALLS // 8,
        want=_with_result(x, *reference.top_k(x, count=spec.count)),
    ):
        yield {
            "op": "top_k",
            "spec": spec.name,
            "is_default": timing.config == default,
            "us": round(timing.seconds * 1e6, 2),
            "gb_per_s": round(4 * x.size / timing.seconds / 1e9, 1),
            "is_correct": timing.error == 0,
            "failure": timing.failure,
            "config": dataclasses.asdict(timing.config),
            "device": device.device_kind,
            "jax": jax.__version__,
        }


def _with_result(x: jax.Array, values: jax.Array, places: jax.Array) -> jax.Array:
    """The argument, changed by what came out, so that the next call has to wait for it."""
    changed = values[:, -1:] + places[:, -1:].astype(jnp.float32) * 1e-6
    return jnp.where(jnp.arange(x.shape[1]) == 0, changed, x)


if __name__ == "__main__":
    print_rows(__doc__, SPECS, rows)
