"""Samplers that follow the text: by feedback on surprise, or by the entropy of the moment."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxengine.sampling.builtin.common import LARGEST, SMALLEST, entropy, keep_from, number_in
from jaxengine.sampling.builtin.standard import temperature
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import Drawn, Logits, LogitsTransform, State
from jaxengine.types import Param
from pallas_kernels.vocab_blocks import logsumexp

_LN2 = float(np.log(2))


def mirostat_v2() -> LogitsTransform:
    """Keeps tokens of surprise up to mu bits and steers mu so that `mirostat_tau` is met; 0 is off.

    mu starts at 2 tau; after each token, mu -= eta (surprise - tau), eta = `mirostat_eta`. As in
    the paper the surprise is the token's in the model's own distribution, so tau is the average
    -log2 probability of the text whatever else the chain does. (llama.cpp takes it after
    truncation, where it is smaller.)

    Source: Basu et al., Mirostat, arXiv:2007.14966; version 2 as in its authors' repository.
    """

    def init(ctx: SamplingContext) -> Float[Array, " B"]:
        return 2 * ctx.mirostat_tau

    def lowest(logits: Logits, mu: State, ctx: SamplingContext) -> Float[Array, " B"]:
        return logsumexp(logits)[0] - mu * _LN2

    def update(mu: State, drawn: Drawn, ctx: SamplingContext) -> Float[Array, " B"]:
        surprise = -drawn.raw_logprob / _LN2
        return mu - ctx.mirostat_eta * (surprise - ctx.mirostat_tau)

    params = {
        "mirostat_tau": Param("float32", 0.0, number_in(0.0, 64.0, "must be a number in [0, 64]")),
        "mirostat_eta": Param("float32", 0.1, number_in(SMALLEST, 1.0, "must be in (0, 1]")),
    }
    return keep_from(
        lowest, lambda ctx: ctx.mirostat_tau > 0, init=init, update=update, params=params
    )


def dynamic_temperature() -> LogitsTransform:
    """A temperature that grows with the entropy; in a chain it takes the place of `temperature()`.

    T = low + (high - low) (H / log n)^exponent, where low and high are `temperature` minus (at
    least 0) and plus `dynatemp_range`, H is the entropy, n the number of tokens left and the
    exponent `dynatemp_exponent`. A range of 0 is off: T is `temperature`. Temperature 0 stays
    greedy.

    Source: llama.cpp `temp_ext`, after kalomaze's dynamic temperature for koboldcpp.
    """

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        def by_entropy(logits: Logits) -> Float[Array, " B"]:
            most = jnp.log((logits > -jnp.inf).sum(axis=-1).astype(jnp.float32))
            share = jnp.where(most > 0, entropy(logits) / most, 0.0)
            low = jnp.maximum(ctx.temperature - ctx.dynatemp_range, 0.0)
            high = ctx.temperature + ctx.dynatemp_range
            dynamic = low + (high - low) * share**ctx.dynatemp_exponent
            is_on = (ctx.dynatemp_range > 0) & (ctx.temperature > 0)
            return jnp.where(is_on, jnp.maximum(dynamic, _COLDEST), ctx.temperature)

        any_row = ((ctx.dynatemp_range > 0) & (ctx.temperature > 0) & ctx.active).any()
        t = jax.lax.cond(any_row, by_entropy, lambda _: ctx.temperature, logits)
        return logits / jnp.where(t == 0, 1.0, t)[:, None]

    def is_on(ctx: SamplingContext) -> Bool[Array, " B"]:
        return (ctx.temperature != 0) & ctx.active

    positive = number_in(0.0, LARGEST, "must be a non-negative finite number")
    params = {
        "dynatemp_range": Param("float32", 0.0, positive),
        "dynatemp_exponent": Param("float32", 1.0, positive),
    }
    params |= temperature().params
    return LogitsTransform(apply, params=params, is_on=is_on, keeps_order=True)


_COLDEST = 1e-6
"""Lowest dynamic temperature: logits divided by it stay finite, and it is as good as greedy."""
