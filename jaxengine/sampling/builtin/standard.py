"""SGLang's own chain, part by part: penalties, bias, temperature, and the three filters."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxengine.sampling.builtin.common import (
    LARGEST,
    SMALLEST,
    number_in,
    scatter_ids,
)
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import Filters, Logits, LogitsTransform, State, when
from jaxengine.types import Param
from pallas_kernels.filter_threshold import filter_threshold

_PENALTY = number_in(-2.0, 2.0, "must be a number in [-2, 2]")


def additive_penalties() -> LogitsTransform:
    """Lowers tokens already generated: by `frequency_penalty` a time, `presence_penalty` once.

    Source: OpenAI API reference, frequency and presence penalties; generated tokens only.
    """

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        counts = ctx.token_counts.astype(jnp.float32)
        frequency = ctx.frequency_penalty[:, None] * counts
        return logits - frequency - ctx.presence_penalty[:, None] * (counts > 0)

    return when(
        lambda ctx: (ctx.frequency_penalty != 0) | (ctx.presence_penalty != 0),
        LogitsTransform(
            apply,
            params={
                "frequency_penalty": Param("float32", 0.0, _PENALTY),
                "presence_penalty": Param("float32", 0.0, _PENALTY),
            },
        ),
    )


def min_new_tokens() -> LogitsTransform:
    """Removes stop tokens until the row has generated `min_new_tokens`."""

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        yes, no = jnp.ones((), bool), jnp.zeros((), bool)
        is_stop = scatter_ids(ctx.stop_token_ids, yes, no, logits.shape)
        return jnp.where(is_stop, -jnp.inf, logits)

    return when(lambda ctx: ctx.num_generated < ctx.min_new_tokens, LogitsTransform(apply))


def repetition_penalty() -> LogitsTransform:
    """Divides positive and multiplies negative logits of generated tokens by the penalty.

    Source: Keskar et al., CTRL, arXiv:1909.05858; generated tokens only, as SGLang.
    """

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        penalty = ctx.repetition_penalty[:, None]
        scaled = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(ctx.token_counts > 0, scaled, logits)

    check = number_in(SMALLEST, 2.0, "must be a number in (0, 2]")
    return when(
        lambda ctx: ctx.repetition_penalty != 1.0,
        LogitsTransform(apply, params={"repetition_penalty": Param("float32", 1.0, check)}),
    )


MAX_LOGIT_BIAS = 256
"""Most tokens `logit_bias` of one request may name."""


def logit_bias() -> LogitsTransform:
    """Adds `logit_bias[id]` to the logits of the given ids.

    The two arrays are filled by the engine from the request's `{id: bias}` mapping.
    """

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        # -0.0 is what adds nothing; and XLA shares 0.0 with others, which would be a copy.
        none = jnp.float32(-0.0)
        return logits + scatter_ids(ctx.logit_bias_ids, ctx.logit_bias_values, none, logits.shape)

    shape = (MAX_LOGIT_BIAS,)
    return when(
        lambda ctx: ctx.logit_bias_ids[:, 0] >= 0,
        LogitsTransform(
            apply,
            params={
                "logit_bias_ids": Param("int32", (), shape=shape, pad=-1),
                "logit_bias_values": Param("float32", (), shape=shape),
            },
        ),
    )


def temperature() -> LogitsTransform:
    """Divides by the temperature; 0 leaves the logits as they are, for the draw to be greedy."""

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        return logits / divisor(ctx)[:, None]

    def divisor(ctx: SamplingContext) -> Float[Array, " B"]:
        return jnp.where(ctx.temperature == 0, 1.0, ctx.temperature)

    def is_on(ctx: SamplingContext) -> Bool[Array, " B"]:
        return (ctx.temperature != 0) & (ctx.temperature != 1) & ctx.active

    check = number_in(0.0, LARGEST, "must be a non-negative finite number")
    params = {"temperature": Param("float32", 1.0, check)}
    return LogitsTransform(apply, params=params, is_on=is_on, keeps_order=True, divisor=divisor)


def top_k_top_p_min_p() -> LogitsTransform:
    """Keeps tokens that pass all three filters, each judged on the unfiltered distribution.

    top_k: the k most likely; top_p: the smallest set whose probability reaches p (the token that
    crosses it is kept); min_p: at least min_p times the most likely. Tokens equal to a threshold
    are kept. Jointly on one distribution is SGLang's default (flashinfer "joint").

    Source: Fan et al., arXiv:1805.04833 (top-k); Holtzman et al., arXiv:1904.09751 (top-p);
    Nguyen et al., arXiv:2407.01082 (min-p).
    """

    def is_filtered(ctx: SamplingContext) -> Bool[Array, " B"]:
        return (ctx.top_k > 0) | (ctx.top_p < 1.0) | (ctx.min_p > 0.0)

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        # Not behind a condition: its operand would be a copy of the logits, and the op itself does
        # little for rows without a filter.
        lowest = filter_threshold(logits, *filters(ctx))
        # NaN stays, for the draw to report it.
        return jnp.where(logits < lowest[:, None], -jnp.inf, logits)

    def filters(ctx: SamplingContext) -> Filters:
        # Rows that draw nothing cost nothing.
        return Filters(
            jnp.where(ctx.active, ctx.top_k, -1),
            jnp.where(ctx.active, ctx.top_p, 1.0),
            jnp.where(ctx.active, ctx.min_p, 0.0),
        )

    positive = number_in(SMALLEST, 1.0, "must be a number in (0, 1]")
    params = {
        "top_k": Param("int32", -1, _top_k_check),
        "top_p": Param("float32", 1.0, positive),
        "min_p": Param("float32", 0.0, number_in(0.0, 1.0, "must be a number in [0, 1]")),
    }
    transform = LogitsTransform(apply, params=params, is_filter=True)
    return when(is_filtered, transform)._replace(filters=filters)


def _top_k_check(value: Any) -> str | None:
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    is_valid = is_int and (value == -1 or 1 <= value < 2**31)
    return None if is_valid else "must be -1 (off) or an integer of at least 1"
