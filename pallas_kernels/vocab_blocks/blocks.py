"""Blocks of a vocabulary, and what is left of them: all that a step needs of most tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BLOCK = 128
"""Tokens of a block."""

WIDE_BLOCK = 512
"""Tokens of a block whose sums XLA makes: what one warp of such a reduction reads."""

LOWEST = float(np.finfo(np.float32).min)
"""Stands for the maximum of a block that has no tokens left."""


class BlockSums(NamedTuple):
    """What is left of each block.

    Attributes:
      max: The largest logit, at least `LOWEST`; NaN if there is one.
      sum: Of exp((logit - max) / temperature).
      temperature: Of each row, positive; None is 1. What lies in memory is divided as it is read.
    """

    max: Float[Array, "B blocks"]
    sum: Float[Array, "B blocks"]
    temperature: Float[Array, " B"] | None = None

    def tempered(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Logits of the rows, divided by their temperatures."""
        if self.temperature is None:
            return x
        return x / self.temperature.reshape(-1, *(1,) * (x.ndim - 1))

    @property
    def log(self) -> Float[Array, "B blocks"]:
        """The logarithm of each block's sum of exp(logit / temperature)."""
        return self.tempered(self.max) + jnp.log(self.sum)

    @property
    def log_total(self) -> Float[Array, " B"]:
        """The logarithm of each row's sum of exp(logit / temperature)."""
        return jax.nn.logsumexp(self.tempered(self.max), b=self.sum, axis=-1)

    def logprob(self, x: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Log-probabilities of tokens of the rows, by their logits."""
        return self.tempered(x) - self.log_total.reshape(-1, *(1,) * (x.ndim - 1))

    def argmax(self, x: Float[Array, "B V"]) -> Int[Array, " B"]:
        """The first of the largest logits of each row `x` whose sums these are; NaN is largest."""
        block = jnp.argmax(self.max, axis=-1)
        place = jnp.argmax(tokens_of(x, block), axis=-1)
        return (block * BLOCK + place).astype(jnp.int32)


def in_blocks(x: Float[Array, "B V"], width: int = BLOCK) -> Float[Array, "B blocks width"]:
    """The tokens by blocks; the last one is filled up with -inf."""
    num_rows, vocab_size = x.shape
    num_blocks = -(-vocab_size // width)
    if vocab_size % width:
        missing = num_blocks * width - vocab_size
        x = jnp.pad(x, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return x.reshape(num_rows, num_blocks, width)


def tokens_of(
    x: Float[Array, "B V"], block: Int[Array, " B"], width: int = BLOCK
) -> Float[Array, "B width"]:
    """The tokens of one block of each row."""
    return jnp.take_along_axis(in_blocks(x, width), block[:, None, None], axis=1)[:, 0]
