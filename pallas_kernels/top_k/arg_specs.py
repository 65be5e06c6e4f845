"""Named shapes of the largest entries: what tests, deviceless compiles and benchmarks run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgSpec:
    """One setting of the op.

    Attributes:
      name: What it is, then the batch.
      num_rows: Rows.
      width: Entries of a row.
      count: How many are taken.
      has_ties: Many entries are equal, and most of some rows -inf.
    """

    name: str
    num_rows: int
    width: int
    count: int = 20
    has_ties: bool = False

    @property
    def is_small(self) -> bool:
        """Whether a CPU serves it in a moment."""
        return self.num_rows * self.width <= 1 << 14

    def shape(self) -> jax.ShapeDtypeStruct:
        """Returns the abstract argument of the op."""
        return jax.ShapeDtypeStruct((self.num_rows, self.width), jnp.float32)

    def array(self, seed: int) -> Float[Array, "B n"]:
        """Returns a random argument of the op."""
        x = np.random.default_rng(seed).standard_normal((self.num_rows, self.width), np.float32)
        if self.has_ties:
            x = np.round(2 * x) + 0.0  # and no -0.0, which sorts below 0.0
            x[::2, self.count // 2 :] = -np.inf
        return jnp.asarray(x)


ARG_SPECS = (
    *(ArgSpec(name=f"block-maxima-b{n}", num_rows=n, width=1187) for n in (1, 16, 64, 256)),
    *(ArgSpec(name=f"tokens-b{n}", num_rows=n, width=2560) for n in (1, 256)),
    ArgSpec(name="ties-b6", num_rows=6, width=300, has_ties=True),
    ArgSpec(name="all-of-a-row-b2", num_rows=2, width=20),
    ArgSpec(name="widest-b4", num_rows=4, width=8192, count=100),
)
