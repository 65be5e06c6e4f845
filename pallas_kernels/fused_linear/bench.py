"""Times the weight product: `python -m pallas_kernels.fused_linear.bench [spec ...]`.

Prints one JSON line per spec and tile choice, the default first, and one for plain products.
`tb_per_s` counts the weight alone. Every row was compared with the reference in the same run.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_main import print_rows
from pallas_kernels.fused_linear import mosaic, reference, triton, tuning
from pallas_kernels.fused_linear.arg_specs import ARG_SPECS, MANY_ROWS_SPECS, ArgSpec
from pallas_kernels.timing import time_configs

_DTYPE = jnp.dtype(jnp.bfloat16)
_COLD_BYTES = 192 << 20  # three times an H200's L2
_CALLS_PER_RUN = 512
_TOLERANCE = 1e-2


def rows(device: Any, specs: Sequence[ArgSpec], is_sweep: bool = True) -> Iterator[dict[str, Any]]:
    """Yields one row per spec and tile choice."""
    with jax.default_device(device):
        for spec in specs:
            yield from _spec_rows(spec, device, is_sweep)


Config = tuning.RowConfig | tuning.TileConfig | tuning.ManyRowsConfig


def _backend(config: Config | None) -> Any:
    if config is None:
        return reference
    return mosaic if isinstance(config, tuning.ManyRowsConfig) else triton


def _sweep(spec: ArgSpec) -> Iterator[Config | None]:
    """Tile choices to try; None is the plain product."""
    yield None
    if spec in MANY_ROWS_SPECS:
        yield from _many_rows()
    else:
        yield from _tiles() if spec.num_rows > tuning.MAX_ROWS else _rows(spec)


def _many_rows() -> Iterator[tuning.ManyRowsConfig]:
    choices = itertools.product(tuning.STAGES.items(), (1, 2), (0, 1), (4, 8, 16), (0, 1, 2))
    for (block_n, num_stages), cluster, minor, width, lag in choices:
        yield tuning.ManyRowsConfig(
            block_n=block_n,
            num_stages=num_stages,
            cluster=cluster,
            minor=minor,
            width=width,
            lag=lag,
        )


def _tiles() -> Iterator[tuning.TileConfig]:
    for block_n, block_k, num_stages in itertools.product((16, 32, 64), (64, 128), (3, 5)):
        yield tuning.TileConfig(block_n=block_n, block_k=block_k, num_stages=num_stages)


def _rows(spec: ArgSpec) -> Iterator[tuning.RowConfig]:
    for block_n, block_k, num_warps in itertools.product((2, 4, 8), (512, 1024, 2048), (2, 4, 8)):
        for num_loads in {-(-spec.depth // block_k), 3}:
            num_registers = (spec.num_rows + num_loads) * block_n * block_k // (32 * num_warps)
            if num_registers <= 192:
                yield tuning.RowConfig(
                    block_n=block_n, block_k=block_k, num_loads=num_loads, num_warps=num_warps
                )


def _spec_rows(spec: ArgSpec, device: Any, is_sweep: bool) -> Iterator[dict[str, Any]]:
    args = spec.arrays(_DTYPE, seed=0)
    x, weight = args.pop("x"), args.pop("weight")
    num_weights = max(-(-_COLD_BYTES // weight.nbytes), 2)
    # Different weights, so that a call finds nothing in the caches.
    calls = [(jnp.roll(weight, i, axis=0),) for i in range(num_weights)]

    def op(x: Any, weight: Any, config: Config | None) -> Any:
        options = {} if config is None else dict(config=config)
        out = _backend(config).fused_linear(x, weight, **args, **spec.options, **options)
        return x + 1e-3 * out[:, :1]  # the next call waits for this one

    default = tuning.find_config(x, weight, is_gated=spec.is_gated)
    configs = [default, *(c for c in _sweep(spec) if c != default)] if is_sweep else [default, None]
    for timing in time_configs(
        op,
        configs,
        x,
        (),
        calls,
        num_rounds=max(_CALLS_PER_RUN // num_weights, 1),
        want=op(x, weight, None),
    ):
        yield {
            "op": "fused_linear",
            "spec": spec.name,
            "backend": _backend(timing.config).__name__.rpartition(".")[2],
            "is_default": timing.config == default,
            "us": round(timing.seconds * 1e6, 2),
            "tb_per_s": round(weight.nbytes / timing.seconds / 1e12, 3),
            "is_correct": timing.error <= _TOLERANCE,
            "error": timing.error,
            "failure": timing.failure,
            "config": timing.config and dataclasses.asdict(timing.config),
            "dtype": _DTYPE.name,
            "device": device.device_kind,
            "jax": jax.__version__,
        }


if __name__ == "__main__":
    print_rows(__doc__, (*ARG_SPECS, *MANY_ROWS_SPECS), rows)
