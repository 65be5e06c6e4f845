"""Truncations: which tokens may be drawn at all, judged by one distribution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxengine.sampling.builtin.common import (
    LARGEST,
    SMALLEST,
    Bounds,
    entropy,
    keep_between,
    keep_from,
    number_in,
)
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import Logits, LogitsTransform, State, when
from jaxengine.types import Param
from pallas_kernels.threshold_search import largest_threshold, ordered
from pallas_kernels.vocab_blocks import logsumexp

_FRACTION = number_in(0.0, 1.0, "must be a number in [0, 1]")


def epsilon() -> LogitsTransform:
    """Keeps tokens of probability `epsilon_cutoff` or more, and always the most likely; 0 is off.

    Source: Hewitt et al., Truncation Sampling as Language Model Desmoothing, arXiv:2210.15191.
    """

    def lowest(logits: Logits, state: State, ctx: SamplingContext) -> Float[Array, " B"]:
        return jnp.log(ctx.epsilon_cutoff) + logsumexp(logits)[0]

    params = {"epsilon_cutoff": Param("float32", 0.0, _FRACTION)}
    return keep_from(lowest, lambda ctx: ctx.epsilon_cutoff > 0, params=params)


def eta() -> LogitsTransform:
    """Keeps tokens of probability min(e, sqrt(e) exp(-H)) or more, e = `eta_cutoff`; 0 is off.

    H is the entropy in nats, so that flat distributions lose less of their tail.

    Source: Hewitt et al., Truncation Sampling as Language Model Desmoothing, arXiv:2210.15191.
    """

    def lowest(logits: Logits, state: State, ctx: SamplingContext) -> Float[Array, " B"]:
        log_e = jnp.log(ctx.eta_cutoff)
        log_eta = jnp.minimum(log_e, log_e / 2 - entropy(logits))
        return log_eta + logsumexp(logits)[0]

    params = {"eta_cutoff": Param("float32", 0.0, _FRACTION)}
    return keep_from(lowest, lambda ctx: ctx.eta_cutoff > 0, params=params)


def top_n_sigma() -> LogitsTransform:
    """Keeps logits within `top_n_sigma` standard deviations of the largest; 0 or less is off.

    Dividing by a temperature moves the bound along, so the tokens kept do not depend on it.

    Source: Tang et al., Top-n-sigma: Not All Logits Are You Need, arXiv:2411.07641.
    """

    def lowest(logits: Logits, state: State, ctx: SamplingContext) -> Float[Array, " B"]:
        is_left = logits > -jnp.inf
        sigma = jnp.std(logits, axis=-1, where=is_left)
        return logits.max(axis=-1) - ctx.top_n_sigma * sigma

    check = number_in(-1.0, LARGEST, "must be a number of at least -1")
    params = {"top_n_sigma": Param("float32", 0.0, check)}
    return keep_from(lowest, lambda ctx: ctx.top_n_sigma > 0, params=params)


def typical() -> LogitsTransform:
    """Keeps the tokens whose surprise is nearest the entropy, `typical_p` of the mass; 1 is off.

    The token that reaches the mass is kept, and those as near as it. The most likely token may go.

    Source: Meister et al., Locally Typical Sampling, arXiv:2202.00666.
    """

    def is_on(ctx: SamplingContext) -> Bool[Array, " B"]:
        return ctx.typical_p < 1

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        def distance(centre: Float[Array, " B"]) -> Logits:
            return jnp.abs(logits - centre[:, None])

        def centre_and_radius(logits: Logits) -> tuple[Array, Array]:
            norm = logsumexp(logits)[0]
            centre = norm - entropy(logits)
            p = jnp.exp(logits - norm[:, None])
            nearness = ordered(-distance(centre))
            least = largest_threshold(
                lambda t: jnp.where(nearness >= t[:, None], p, 0.0).sum(axis=-1) >= ctx.typical_p,
                logits.shape[0],
            )
            is_far = nearness < least[:, None]
            return centre, jnp.where(is_far, 0.0, distance(centre)).max(axis=-1)

        zeros = jnp.zeros(logits.shape[:1])
        any_row = (is_on(ctx) & ctx.active).any()
        centre, radius = jax.lax.cond(
            any_row, centre_and_radius, lambda _: (zeros, zeros + jnp.inf), logits
        )
        return jnp.where(distance(centre) > radius[:, None], -jnp.inf, logits)

    check = number_in(SMALLEST, 1.0, "must be a number in (0, 1]")
    params = {"typical_p": Param("float32", 1.0, check)}
    return when(is_on, LogitsTransform(apply, params=params, is_filter=True))


def xtc() -> LogitsTransform:
    """Removes, with `xtc_probability`, all tokens above `xtc_threshold` but the least likely.

    Exclude Top Choices: the likeliest continuations go where several are viable. A probability of
    0 or a threshold above 0.5 is off.

    Source: P. E. Weidmann, text-generation-webui pull request 6335; llama.cpp `xtc`.
    """

    def bounds(logits: Logits, state: State, ctx: SamplingContext) -> Bounds:
        viable = jnp.log(ctx.xtc_threshold) + logsumexp(logits)[0]
        least = jnp.where(logits >= viable[:, None], logits, jnp.inf).min(axis=-1)
        keys = jax.vmap(jax.random.fold_in, (0, None))(ctx.key, _XTC_STREAM)
        is_hit = jax.vmap(jax.random.uniform)(keys) < ctx.xtc_probability
        return -jnp.inf, jnp.where(is_hit, least, jnp.inf)

    params = {
        "xtc_probability": Param("float32", 0.0, _FRACTION),
        "xtc_threshold": Param("float32", 0.1, _FRACTION),
    }
    return keep_between(
        bounds, lambda ctx: (ctx.xtc_probability > 0) & (ctx.xtc_threshold <= 0.5), params=params
    )


_XTC_STREAM = 0x787463
"""Sets its coin apart from the noise of the draw."""
