"""Samplers that are new: their papers are young and their names may not last."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.sampling import LogitsTransform, Param, SamplingContext
from jaxengine.sampling.builtin.common import integer_in, keep_from, number_in
from jaxengine.sampling.logprobs import largest


def p_less() -> LogitsTransform:
    """Keeps tokens of probability sum(p^2) or more, the chance that two draws agree; `p_less` 1.

    Source: Tan et al., p-less Sampling, arXiv:2509.23234.
    """

    def lowest(logits: Float[Array, "B V"], state: tuple, ctx: SamplingContext) -> Array:
        norm = jax.nn.logsumexp(logits, axis=-1)
        return jax.nn.logsumexp(2 * logits, axis=-1) - norm

    params = {"p_less": Param("int32", 0, integer_in(0, 1, "must be 0 (off) or 1"))}
    return keep_from(lowest, lambda ctx: ctx.p_less > 0, params=params)


TOP_H_TOKENS = 100
"""Only so many of the likeliest tokens are looked at."""


def top_h() -> LogitsTransform:
    """Keeps the likeliest tokens while their terms of the entropy sum to `top_h` of it; 0 is off.

    Source: Top-H Decoding, arXiv:2509.02510; as in transformers, terms not renormalised.
    """

    def lowest(logits: Float[Array, "B V"], state: tuple, ctx: SamplingContext) -> Array:
        top, _ = largest(logits, min(TOP_H_TOKENS, logits.shape[-1]))
        log_p = jax.nn.log_softmax(top)
        terms = -jnp.where(top > -jnp.inf, jnp.exp(log_p) * log_p, 0.0)
        is_kept = jnp.cumsum(terms, axis=-1) <= ctx.top_h[:, None] * terms.sum(-1, keepdims=True)
        return jnp.where(is_kept, top, jnp.inf).min(axis=-1)

    params = {"top_h": Param("float32", 0.0, number_in(0.0, 1.0, "must be a number in [0, 1]"))}
    return keep_from(lowest, lambda ctx: ctx.top_h > 0, params=params)
