"""The threshold of the filters in plain jnp: the meaning of the op, and its path on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from pallas_kernels.threshold_search import largest_threshold, ordered, unordered
from pallas_kernels.vocab_blocks import BlockSums


@jax.jit
def filter_threshold(
    logits: Float[Array, "B V"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    min_p: Float[Array, " B"],
    *,
    sums: BlockSums | None = None,
) -> Float[Array, " B"]:
    """Tries the threshold bit by bit, each a pass over the logits; no pass where min-p is all."""
    top = logits.max(axis=-1)
    temperature = None if sums is None else sums.temperature
    temperature = jnp.float32(1) if temperature is None else temperature
    has_k, has_p = (top_k >= 1) & (top_k < logits.shape[-1]), top_p < 1

    def searched(logits: Float[Array, "B V"]) -> Float[Array, " B"]:
        weights = jnp.exp(((logits - top[:, None]).T / temperature).T)
        mass = top_p * weights.sum(axis=-1)
        keys = ordered(logits)

        def is_enough(threshold: UInt[Array, " B"]) -> Bool[Array, " B"]:
            is_kept = keys >= threshold[:, None]
            count = is_kept.sum(axis=-1, dtype=jnp.int32)
            sum_kept = jnp.where(is_kept, weights, 0.0).sum(axis=-1)
            return has_k & (count >= top_k) | has_p & (sum_kept >= mass)

        found = largest_threshold(is_enough, logits.shape[0])
        return jnp.where(found == 0, -jnp.inf, unordered(found))

    by_search = jax.lax.cond(
        (has_k | has_p).any(), searched, lambda _: jnp.full_like(top, -jnp.inf), logits
    )
    return jnp.maximum(by_search, top + temperature * jnp.log(min_p))
