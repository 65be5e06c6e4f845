"""Rotation and write in plain jnp: the meaning of the op, and its path on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.rotary import rotate


@jax.jit
def rotate_and_write(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    cos: Float[Array, "T half"],
    sin: Float[Array, "T half"],
    kv_pages: Float[Array, "pages 2 K page_size H"],
    write_pages: Int[Array, " T"],
    write_offsets: Int[Array, " T"],
) -> tuple[Float[Array, "T N H"], Float[Array, "pages 2 K page_size H"]]:
    """Rotates, then scatters; see `api.rotate_and_write`."""
    kv = jnp.stack([rotate(k, cos, sin), v], axis=1)
    return rotate(q, cos, sin), kv_pages.at[write_pages, :, :, write_offsets].set(kv)
