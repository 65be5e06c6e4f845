"""Named shapes of the sum and its norm: what tests, deviceless compiles and benchmarks run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.random_args import random_normal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One setting of the op.

    Attributes:
      name: What it is, then the rows.
      num_parts: Parts of the product.
      num_rows: Rows.
      num_columns: Width of the residual stream.
    """

    name: str
    num_parts: int
    num_rows: int
    num_columns: int

    @property
    def options(self) -> dict[str, Any]:
        """What is static of a call."""
        return dict(eps=1e-6)

    def shapes(self, dtype: jax.typing.DTypeLike) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns abstract arguments of the op, by name."""
        rows, columns = self.num_rows, self.num_columns
        return dict(
            parts=jax.ShapeDtypeStruct((self.num_parts, rows, columns), jnp.float32),
            residual=jax.ShapeDtypeStruct((rows, columns), dtype),
            weight=jax.ShapeDtypeStruct((columns,), dtype),
        )

    def arrays(self, dtype: jax.typing.DTypeLike, seed: int) -> dict[str, jax.Array]:
        """Returns random arguments of the op, by name."""
        return {
            name: jnp.asarray(random_normal(seed + i, shape.shape), shape.dtype)
            for i, (name, shape) in enumerate(self.shapes(dtype).items())
        }


ARG_SPECS = (
    *(
        ArgSpec(name=f"qwen2.5-0.5b-m{rows}", num_parts=8, num_rows=rows, num_columns=896)
        for rows in (16, 64, 256)
    ),
    ArgSpec(name="qwen2.5-7b-m256", num_parts=2, num_rows=256, num_columns=3584),
    ArgSpec(name="odd-m3", num_parts=3, num_rows=3, num_columns=37),
    ArgSpec(name="one-part-m1", num_parts=1, num_rows=1, num_columns=64),
)
