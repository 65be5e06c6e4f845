"""Named shapes of the weight product: what tests, deviceless compiles and benchmarks run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.random_args import random_normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One setting of the op.

    Attributes:
      name: Model and product, then the rows.
      num_rows: Rows of `x`.
      depth: Columns of `x`.
      num_columns: Columns of the result.
      has_norm: A norm comes before.
      has_bias: A bias comes after.
      is_gated: The result is a gated linear unit.
      has_residual: A residual is added.
    """

    name: str
    num_rows: int
    depth: int
    num_columns: int
    has_norm: bool = False
    has_bias: bool = False
    is_gated: bool = False
    has_residual: bool = False

    @property
    def weight_shape(self) -> tuple[int, int]:
        return (2 if self.is_gated else 1) * self.num_columns, self.depth

    @property
    def options(self) -> dict[str, Any]:
        """What is static of a call."""
        return dict(eps=1e-5 if self.has_norm else 0.0, glu=jax.nn.silu if self.is_gated else None)

    def shapes(self, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract arguments of the op, by name."""
        rows, (out, depth) = self.num_rows, self.weight_shape
        shapes: dict[str, tuple[int, ...]] = dict(x=(rows, depth), weight=(out, depth))
        if self.has_norm:
            shapes["norm_weight"] = (depth,)
        if self.has_bias:
            shapes["bias"] = (out,)
        if self.has_residual:
            shapes["residual"] = (rows, self.num_columns)
        return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}

    def arrays(self, dtype: jax.typing.DTypeLike, seed: int) -> dict[str, jax.Array]:
        """Returns random arguments of the op, by name; results are around 1."""
        scales = dict(weight=self.depth**-0.5)
        return {
            name: jnp.asarray(scales.get(name, 1.0) * random_normal(seed + i, shape.shape), dtype)
            for i, (name, shape) in enumerate(self.shapes(dtype).items())
        }


def _layer(name: str, rows: int, hidden: int, heads: int, ffn: int) -> tuple[ArgSpec, ...]:
    """The four products of a layer."""
    return (
        ArgSpec(
            name=f"{name}-qkv-m{rows}",
            num_rows=rows,
            depth=hidden,
            num_columns=heads,
            has_norm=True,
            has_bias=True,
        ),
        ArgSpec(
            name=f"{name}-out-m{rows}",
            num_rows=rows,
            depth=hidden,
            num_columns=hidden,
            has_residual=True,
        ),
        ArgSpec(
            name=f"{name}-gate-up-m{rows}",
            num_rows=rows,
            depth=hidden,
            num_columns=ffn,
            has_norm=True,
            is_gated=True,
        ),
        ArgSpec(
            name=f"{name}-down-m{rows}",
            num_rows=rows,
            depth=ffn,
            num_columns=hidden,
            has_residual=True,
        ),
    )


def _tiled(rows: int) -> tuple[ArgSpec, ...]:
    """The products of a layer of 0.5B that the tile kernel takes."""
    return _layer("qwen2.5-0.5b", rows, 896, 1152, 4864)[:2]


ARG_SPECS = (
    *_layer("qwen2.5-0.5b", 1, 896, 1152, 4864),
    *(spec for spec in _layer("qwen2.5-0.5b", 4, 896, 1152, 4864) if not spec.is_gated),
    *(spec for spec in _layer("qwen2.5-7b", 1, 3584, 4608, 18944) if not spec.is_gated),
    *_tiled(64),
    *_tiled(128),
    *_tiled(256),
    *_layer("demo", 1, 128, 512, 352),
    ArgSpec(
        name="odd-m70",
        num_rows=70,
        depth=200,
        num_columns=37,
        has_norm=True,
        has_bias=True,
        has_residual=True,
    ),
    ArgSpec(name="odd-m3", num_rows=3, depth=1100, num_columns=37, has_norm=True, has_bias=True),
    ArgSpec(name="plain-m2", num_rows=2, depth=72, num_columns=50),
    ArgSpec(
        name="all-m1",
        num_rows=1,
        depth=1000,
        num_columns=6,
        has_norm=True,
        has_bias=True,
        is_gated=True,
        has_residual=True,
    ),
)

MANY_ROWS_SPECS = (
    *(
        ArgSpec(
            name=f"qwen2.5-0.5b-gate-up-m{rows}",
            num_rows=rows,
            depth=896,
            num_columns=4864,
            is_gated=True,
        )
        for rows in (128, 256, 512, 1024)
    ),
    ArgSpec(
        name="qwen2.5-0.5b-gate-up-m2048",
        num_rows=2048,
        depth=896,
        num_columns=4864,
        is_gated=True,
    ),
    ArgSpec(
        name="qwen2.5-0.5b-gate-up-m8192",
        num_rows=8192,
        depth=896,
        num_columns=4864,
        is_gated=True,
    ),
    ArgSpec(name="deep-m8192", num_rows=8192, depth=2048, num_columns=256, is_gated=True),
    ArgSpec(
        name="all-m2048",
        num_rows=2048,
        depth=192,
        num_columns=256,
        has_bias=True,
        is_gated=True,
        has_residual=True,
    ),
)
"""Of the kernel for many rows, at the tiles that `tuning` takes."""
