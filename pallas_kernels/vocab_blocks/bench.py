"""Times the block sums: `python -m pallas_kernels.vocab_blocks.bench [spec ...]`.

Prints one JSON line per op, spec and tile choice, the default choice first: the sums with a
temperature, and those of what is left where every block loses a part. Every row was compared with
the reference in the same run.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_main import print_rows
from pallas_kernels.timing import time_configs
from pallas_kernels.vocab_blocks import reference, triton
from pallas_kernels.vocab_blocks.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.vocab_blocks.blocks import BlockSums

_CALLS = 64
SPECS = tuple(spec for spec in ARG_SPECS if not spec.is_odd)  # all finite
SWEEP = [
    triton.TuningConfig(tile_blocks=blocks, num_warps=warps)
    for blocks, warps in ((8, 2), (8, 4), (16, 2), (32, 4), (32, 8))
]
"""Launch parameters to try."""


def rows(
    device: Any, specs: Sequence[ArgSpec] = SPECS, is_sweep: bool = True
) -> Iterator[dict[str, Any]]:
    """Yields one row per op, spec and choice."""
    with jax.default_device(device):
        for spec in specs:
            yield from _spec_rows(spec, device, SWEEP if is_sweep else [])


def _spec_rows(
    spec: ArgSpec, device: Any, sweep: Sequence[triton.TuningConfig]
) -> Iterator[dict[str, Any]]:
    x = spec.array(0)
    temperature, lowest = jnp.full(spec.num_rows, 0.8), jnp.zeros(spec.num_rows)
    sums = reference.block_sums(x, temperature)

    def all_of(module: Any, x: jax.Array, **how: Any) -> BlockSums:
        return module.block_sums(x, temperature, **how)

    def kept(module: Any, x: jax.Array, **how: Any) -> BlockSums:
        return module.kept_sums(x, sums, lowest, **how)

    for name, op in (("block_sums", all_of), ("kept_sums", kept)):
        yield from _op_rows(name, op, spec, x, device, sweep)


def _op_rows(
    name: str,
    op: Callable[..., BlockSums],
    spec: ArgSpec,
    x: jax.Array,
    device: Any,
    sweep: Sequence[triton.TuningConfig],
) -> Iterator[dict[str, Any]]:
    def call(x: jax.Array, *, config: triton.TuningConfig) -> jax.Array:
        return _with_result(x, op(triton, x, config=config))

    default = triton.TuningConfig()
    for timing in time_configs(
        call,
        [default, *(config for config in sweep if config != default)],
        x,
        (),
        [()] * 8,
        num_rounds=_CALLS // 8,
        want=_with_result(x, op(reference, x)),
    ):
        yield {
            "op": name,
            "spec": spec.name,
            "is_default": timing.config == default,
            "us": round(timing.seconds * 1e6, 2),
            "gb_per_s": round(4 * x.size / timing.seconds / 1e9, 1),
            "is_correct": timing.error < 1e-5,
            "failure": timing.failure,
            "config": dataclasses.asdict(timing.config),
            "device": device.device_kind,
            "jax": jax.__version__,
        }


def _with_result(x: jax.Array, sums: BlockSums) -> jax.Array:
    """The argument, changed by what came out, so that the next call has to wait for it."""
    return x.at[:, 0].set(jnp.maximum(sums.log, -100).mean(axis=-1))


if __name__ == "__main__":
    print_rows(__doc__, SPECS, rows)
