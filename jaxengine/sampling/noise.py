"""Noise for every token of every row, cheap beside reading the logits."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

type Uint32 = np.ndarray | jax.Array


def mixed(x: Uint32) -> Uint32:
    """Any 32 bits to 32 bits that look random, one to one; the same on the host.

    Source: C. Wellons, hash-prospector, `lowbias32`.
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def gumbel(keys: Key[Array, " B"], width: int) -> Float[Array, "B V"]:
    """Standard Gumbel noise in (-3, 17), a function of the row's key and the token alone.

    The row's key is a good generator's; from there on two rounds of a hash are enough. The work of
    `jax.random.gumbel` is felt at large batches: a block cipher for every token.
    """
    key = jax.random.key_data(keys)[:, :, None]
    token = jnp.arange(width, dtype=jnp.uint32)
    bits = mixed(mixed(token ^ key[:, 0]) ^ key[:, 1])
    # Half steps: neither 0 nor 1, so no infinities; 23 bits, or the largest would round to 1.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * jnp.float32(2**-23)
    return -jnp.log(-jnp.log(uniform))
