"""Named shapes of the block sums: what tests, deviceless compiles and benchmarks run."""

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
      width: Tokens of a row.
      is_odd: Rows hold what is rare: large numbers, equal ones, removed tokens and whole blocks.
    """

    name: str
    num_rows: int
    width: int = 151936
    is_odd: bool = False

    @property
    def is_small(self) -> bool:
        """Whether a CPU serves it in a moment."""
        return self.num_rows * self.width <= 1 << 16

    def shape(self) -> jax.ShapeDtypeStruct:
        """Returns the abstract argument of the op."""
        return jax.ShapeDtypeStruct((self.num_rows, self.width), jnp.float32)

    def array(self, seed: int) -> Float[Array, "B V"]:
        """Returns a random argument of the op."""
        x = np.random.default_rng(seed).standard_normal((self.num_rows, self.width), np.float32)
        x *= 5
        if self.is_odd:
            x[1] += 3000
            x[2] -= 3000
            x[3, self.width // 3 :] = -np.inf
            x[4, 1:] = -np.inf
            x[5] = np.round(x[5])
            x[6] = -np.inf
        return jnp.asarray(x)


ARG_SPECS = (
    *(ArgSpec(name=f"qwen-b{n}", num_rows=n) for n in (1, 16, 64, 256)),
    ArgSpec(name="llama-b64", num_rows=64, width=128256),
    ArgSpec(name="odd-b7", num_rows=7, width=5000, is_odd=True),
    ArgSpec(name="less-than-a-block-b2", num_rows=2, width=100),
    ArgSpec(name="one-tile-b3", num_rows=3, width=2048),
)
