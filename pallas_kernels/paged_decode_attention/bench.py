"""Times paged decode attention: `python -m pallas_kernels.paged_decode_attention.bench [spec ...]`.

Prints one JSON line per spec and tile choice, the default choice first. `tb_per_s` counts keys and
values alone. Every row was compared with the reference in the same run.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench_main import print_rows
from pallas_kernels.paged_decode_attention import reference, triton, tuning
from pallas_kernels.paged_decode_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.timing import time_configs

_DTYPE = jnp.dtype(jnp.bfloat16)
_COLD_BYTES = 192 << 20  # three times an H200's L2
_MAX_TABLES = 256
_MIN_CALLS = 8  # in one command buffer
_CALLS_PER_RUN = 512
_TOLERANCE = 1e-2


def _grid(**choices: Sequence[int]) -> list[tuning.TuningConfig]:
    return [
        tuning.TuningConfig(**dict(zip(choices, values, strict=True)))
        for values in itertools.product(*choices.values())
    ]


_TILES = [
    *_grid(block_kv=(32, 64, 128), num_warps=(2, 4), num_stages=(2, 3, 4), num_splits=(1,)),
    *_grid(block_kv=(64, 128), num_warps=(8,), num_stages=(3,), num_splits=(1,)),
]
_SPLITS = _grid(block_kv=(64,), num_splits=(1, 2, 4, 8, 16), min_split_tiles=(1,))
SWEEPS = {
    "qwen2.5-0.5b-b256": [*_TILES, *_SPLITS],
    "qwen2.5-0.5b-b128-uneven": _SPLITS,
    "qwen2.5-0.5b-b64": _SPLITS,
    "qwen2.5-0.5b-b16": _grid(
        block_kv=(64,), num_warps=(2, 4), num_splits=(4, 8, 16), min_split_tiles=(1,)
    ),
    "qwen2.5-0.5b-b1": [
        *_grid(block_kv=(32, 64), num_warps=(2, 4), num_splits=(8, 16, 32), min_split_tiles=(1,)),
        *_grid(block_kv=(128,), num_warps=(4, 8), num_splits=(1, 8)),
    ],
    "qwen2.5-0.5b-b1-long": _grid(block_kv=(64, 128), num_splits=(32, 64, 128)),
    "qwen2.5-7b-b128": [
        *_grid(block_kv=(16, 32, 64), num_warps=(2, 4), num_stages=(2, 3, 4), num_splits=(1,)),
        *_grid(block_kv=(32,), num_splits=(2, 4)),
    ],
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
    spec: ArgSpec, device: Any, sweep: Sequence[tuning.TuningConfig]
) -> Iterator[dict[str, Any]]:
    num_bytes = spec.cache_elements * _DTYPE.itemsize
    num_tables = min(-(-_COLD_BYTES // max(num_bytes, 1)), _MAX_TABLES)
    # Tables of different pages of one pool, so that a call finds nothing in the caches.
    many = dataclasses.replace(spec, kv_lens=spec.kv_lens * num_tables)
    *new, kv_pages, page_table, kv_lens = many.arrays(_DTYPE, seed=0)
    batch = len(spec.kv_lens)
    q, *shared = (array[:batch] for array in new)
    kv_lens = kv_lens[:batch]
    tables = page_table.reshape(num_tables, batch, -1)
    calls = [(tables[i % num_tables], kv_lens) for i in range(max(num_tables, _MIN_CALLS))]
    default = tuning.default_config(q)

    def op(carry: tuple[Any, ...], k: Any, v: Any, cos: Any, sin: Any, *call: Any, config: Any):
        q, kv_pages = carry
        return triton.paged_decode_attention(
            q, k, v, cos, sin, kv_pages, *call, scale=spec.heads.scale, config=config
        )

    want, _ = reference.paged_decode_attention(
        q, *shared, kv_pages, *calls[0], scale=spec.heads.scale
    )
    for timing in time_configs(
        op,
        [default, *(config for config in sweep if config != default)],
        (q, kv_pages),
        tuple(shared),
        calls,
        num_rounds=max(_CALLS_PER_RUN // len(calls), 1),
        want=want,
    ):
        yield {
            "op": "paged_decode_attention",
            "spec": spec.name,
            "is_default": timing.config == default,
            "us": round(timing.seconds * 1e6, 2),
            "tb_per_s": round(num_bytes / timing.seconds / 1e12, 3),
            "is_correct": timing.error <= _TOLERANCE,
            "error": timing.error,
            "failure": timing.failure,
            "num_splits": tuning.choose_num_splits(
                timing.config, batch, spec.heads.num_kv_heads, spec.pages_per_row * spec.page_size
            ),
            "config": dataclasses.asdict(timing.config),
            "cold_mb": num_bytes * num_tables >> 20,
            "dtype": _DTYPE.name,
            "device": device.device_kind,
            "jax": jax.__version__,
        }


if __name__ == "__main__":
    print_rows(__doc__, ARG_SPECS, rows)
