"""Times the sum and its norm: `python -m pallas_kernels.add_norm.bench [spec ...]`.

Prints one JSON line per spec and number of warps, the default first. Every row was compared with
the reference in the same run.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm import reference, triton
from pallas_kernels.add_norm.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.bench_main import print_rows
from pallas_kernels.timing import time_configs

_CALLS = 256
_TOLERANCE = 1e-2
SWEEP = (1, 2, 4, 8)
"""Numbers of warps to try."""


def rows(
    device: Any, specs: Sequence[ArgSpec] = ARG_SPECS, is_sweep: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields one row per spec and choice."""
    with jax.default_device(device):
        for spec in specs:
            yield from _spec_rows(spec, device, SWEEP if is_sweep else ())


def _spec_rows(spec: ArgSpec, device: Any, sweep: Sequence[int]) -> Iterator[dict[str, Any]]:
    args = spec.arrays(jnp.bfloat16, seed=0)
    parts, residual, weight = args["parts"], args["residual"], args["weight"]

    def op(x: jax.Array, *, config: int) -> jax.Array:
        out, norm = triton.add_norm(parts, x, weight, **spec.options, num_warps=config)
        return _next(out, norm)

    for timing in time_configs(
        op,
        [triton.NUM_WARPS, *(n for n in sweep if n != triton.NUM_WARPS)],
        residual,
        (),
        [()] * 8,
        num_rounds=_CALLS // 8,
        want=_next(*reference.add_norm(parts, residual, weight, **spec.options)),
    ):
        yield {
            "op": "add_norm",
            "spec": spec.name,
            "is_default": timing.config == triton.NUM_WARPS,
            "us": round(timing.seconds * 1e6, 2),
            "gb_per_s": round(parts.nbytes / timing.seconds / 1e9, 1),
            "is_correct": timing.error <= _TOLERANCE,
            "failure": timing.failure,
            "config": {"num_warps": timing.config},
            "device": device.device_kind,
            "jax": jax.__version__,
        }


def _next(out: jax.Array, norm: jax.Array) -> jax.Array:
    """What the next call adds to: of both results, so that it waits for them."""
    return (out - norm).astype(out.dtype)


if __name__ == "__main__":
    print_rows(__doc__, ARG_SPECS, rows)
