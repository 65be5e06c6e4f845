"""A sampler as a user would write one: what the bench takes for "custom"."""

import jax
import jax.numpy as jnp

from jaxengine.sampling import LogitsTransform, Sampler, chain, temperature

TARGET_NATS, RATE = 4.0, 0.1
"""Surprise that is steered to, and how fast."""


def mirostat_like() -> Sampler:
    """Keeps tokens of surprise up to mu, and steers mu by the surprise of what was drawn.

    Source: after Basu et al., Mirostat, arXiv:2007.14966.
    """

    def init(ctx):
        return jnp.full_like(ctx.temperature, 2 * TARGET_NATS)

    def apply(logits, mu, ctx):
        lowest = jax.nn.logsumexp(logits, axis=-1) - mu
        lowest = jnp.minimum(lowest, logits.max(axis=-1))
        return jnp.where(logits >= lowest[:, None], logits, -jnp.inf)

    def update(mu, drawn, ctx):
        return mu - RATE * (-drawn.raw_logprob - TARGET_NATS)

    return Sampler(chain(temperature(), LogitsTransform(apply, init=init, update=update)))
