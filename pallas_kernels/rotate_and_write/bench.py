"""Times rotation and write: `python -m pallas_kernels.rotate_and_write.bench [spec ...]`.

Prints one JSON line per spec for the kernel and one for plain XLA. `tb_per_s` counts what must be
read and written once. Every row was compared with the reference in the same run.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_main import print_rows
from pallas_kernels.rotate_and_write import reference, triton
from pallas_kernels.rotate_and_write.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.timing import time_configs

_DTYPE = jnp.dtype(jnp.bfloat16)
_TOLERANCE = 1e-2
_BACKENDS = {
    "triton": triton.rotate_and_write,
    "reference": reference.rotate_and_write,
}


def rows(
    device: Any, specs: Sequence[ArgSpec] = ARG_SPECS, is_sweep: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields one row per spec and backend, or of the kernel alone."""
    with jax.default_device(device):
        for spec in specs:
            yield from _spec_rows(spec, device, [*_BACKENDS] if is_sweep else ["triton"])


def _spec_rows(spec: ArgSpec, device: Any, backends: Sequence[str]) -> Iterator[dict[str, Any]]:
    q, k, v, cos, sin, cache, pages, offsets = spec.arrays(_DTYPE, seed=0)
    cache = jnp.zeros_like(cache)

    def op(carry: Any, *, config: str) -> Any:
        return _BACKENDS[config](carry[0], k, v, cos, sin, carry[1], pages, offsets)

    carry = q, cache
    want, _ = op(carry, config="reference")
    num_bytes = 2 * (q.nbytes + k.nbytes + v.nbytes) + cos.nbytes + sin.nbytes
    for timing in time_configs(op, backends, carry, (), [()], num_rounds=256, want=want):
        yield {
            "op": "rotate_and_write",
            "spec": spec.name,
            "backend": timing.config,
            "us": round(timing.seconds * 1e6, 2),
            "tb_per_s": round(num_bytes / timing.seconds / 1e12, 3),
            "is_correct": timing.error <= _TOLERANCE,
            "error": timing.error,
            "failure": timing.failure,
            "dtype": _DTYPE.name,
            "device": device.device_kind,
            "jax": jax.__version__,
        }


if __name__ == "__main__":
    print_rows(__doc__, ARG_SPECS, rows)
