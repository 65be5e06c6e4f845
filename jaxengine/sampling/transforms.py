"""Logits transforms and their algebra: what happens between the model and the draw.

A transform is a bundle of pure functions plus the per-request values it needs; `chain` applies
them in the order written. To samplers what optax is to optimisers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxengine.sampling.context import SamplingContext
from jaxengine.types import Param

type Logits = Float[Array, "B V"]
type State = Any
"""A pytree with leading axis B; () when there is none."""


class Drawn(NamedTuple):
    """What was drawn, for `update`.

    Attributes:
      token: The drawn ids.
    """

    token: Int[Array, " B"]


class LogitsTransform(NamedTuple):
    """A step between the model's logits and the draw. Every function sees the B rows of the step.

    Attributes:
      apply: (logits, state, ctx) -> logits; -inf removes a token.
      init: ctx -> state of newly admitted rows.
      update: (state, drawn, ctx) -> state, after the draw.
      params: Per-request values, by name; they become sampling-parameter keys.
      is_on: ctx -> bool[B], the rows it changes; None is all of them. A step in which no row of
        any such transform is on takes a path that does not contain them.
      is_filter: Removes tokens rather than reshaping the distribution; SGLang's token logprobs
        are those before the first filter.
      keeps_order: Never changes which token is the most likely, so greedy rows may skip it.
      stages: The parts of a chain, in order; () for a single transform.
    """

    apply: Callable[[Logits, State, SamplingContext], Logits]
    init: Callable[[SamplingContext], State] = lambda ctx: ()
    update: Callable[[State, Drawn, SamplingContext], State] = lambda state, drawn, ctx: state
    params: Mapping[str, Param] = {}
    is_on: Callable[[SamplingContext], Bool[Array, " B"]] | None = None
    is_filter: bool = False
    keeps_order: bool = False
    stages: tuple["LogitsTransform", ...] = ()


def chain(*transforms: LogitsTransform) -> LogitsTransform:
    """Applies transforms in the order written; nested chains are flattened.

    Raises:
      ValueError: If two transforms declare the same parameter differently.
    """
    stages = tuple(s for t in transforms for s in (t.stages or (t,)))

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        for stage, stage_state in zip(stages, state, strict=True):
            logits = stage.apply(logits, stage_state, ctx)
        return logits

    def init(ctx: SamplingContext) -> State:
        return tuple(stage.init(ctx) for stage in stages)

    def update(state: State, drawn: Drawn, ctx: SamplingContext) -> State:
        return tuple(s.update(x, drawn, ctx) for s, x in zip(stages, state, strict=True))

    return LogitsTransform(apply, init, update, merge_params(stages), stages=stages)


def merge_params(transforms: tuple[LogitsTransform, ...]) -> dict[str, Param]:
    """All parameters of several transforms; a shared name must mean the same thing."""
    merged: dict[str, Param] = {}
    for transform in transforms:
        for name, param in transform.params.items():
            if merged.setdefault(name, param) != param:
                raise ValueError(f"two transforms declare the parameter `{name}` differently")
    return merged


def when(
    predicate: Callable[[SamplingContext], Bool[Array, " B"]], transform: LogitsTransform
) -> LogitsTransform:
    """Rows where `predicate(ctx)` is False pass unchanged; when all are, nothing runs at all."""

    def is_on(ctx: SamplingContext) -> Bool[Array, " B"]:
        return predicate(ctx) & ctx.active

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        return jnp.where(is_on(ctx)[:, None], transform.apply(logits, state, ctx), logits)

    return transform._replace(apply=apply, is_on=is_on, stages=())


def _number(low: float, high: float, clause: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        return None if is_number and low <= value <= high else clause

    return check


_PENALTY = _number(-2.0, 2.0, "must be a number in [-2, 2]")
_SMALLEST = float(np.nextafter(0.0, 1.0))
_LARGEST = float(np.finfo(np.float32).max)


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
        is_stop = _scatter(ctx.stop_token_ids, yes, no, logits.shape)
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

    check = _number(_SMALLEST, 2.0, "must be a number in (0, 2]")
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
        return logits + _scatter(ctx.logit_bias_ids, ctx.logit_bias_values, none, logits.shape)

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
        return logits / jnp.where(ctx.temperature == 0, 1.0, ctx.temperature)[:, None]

    check = _number(0.0, _LARGEST, "must be a non-negative finite number")
    params = {"temperature": Param("float32", 1.0, check)}
    return LogitsTransform(apply, params=params, keeps_order=True)


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
        def lowest_kept(logits: Logits) -> UInt[Array, " B"]:
            top = logits.max(axis=-1, keepdims=True)
            weights = jnp.exp(logits - top)
            mass = ctx.top_p * weights.sum(axis=-1)
            k = jnp.where(ctx.top_k < 1, logits.shape[-1], ctx.top_k)
            keys = _ordered(logits)
            by_k, by_p = _largest_thresholds(
                lambda t_k, t_p: (
                    (keys >= t_k[:, None]).sum(axis=-1, dtype=jnp.int32) >= k,
                    jnp.where(keys >= t_p[:, None], weights, 0.0).sum(axis=-1) >= mass,
                ),
                logits.shape[0],
            )
            # At p = 1 rounding of the sums must not cost the last token.
            by_p = jnp.where(ctx.top_p >= 1.0, 0, by_p)
            by_min_p = _ordered(top + jnp.log(ctx.min_p)[:, None])[:, 0]
            return jnp.maximum(jnp.maximum(by_k, by_p), by_min_p)

        nothing = jnp.zeros(logits.shape[:1], jnp.uint32)
        any_row = (is_filtered(ctx) & ctx.active).any()
        lowest = jax.lax.cond(any_row, lowest_kept, lambda _: nothing, logits)
        # NaN stays, whatever its sign, for the draw to report it.
        is_kept = (_ordered(logits) >= lowest[:, None]) | jnp.isnan(logits)
        return jnp.where(is_kept, logits, -jnp.inf)

    positive = _number(_SMALLEST, 1.0, "must be a number in (0, 1]")
    params = {
        "top_k": Param("int32", -1, _top_k_check),
        "top_p": Param("float32", 1.0, positive),
        "min_p": Param("float32", 0.0, _number(0.0, 1.0, "must be a number in [0, 1]")),
    }
    return when(is_filtered, LogitsTransform(apply, params=params, is_filter=True))


def _scatter(
    ids: Int[Array, "B n"], values: Array, neutral: Array, shape: tuple[int, ...]
) -> Array:
    """`neutral` [B, V] but for `values` at the given ids; -1 is padding.

    Not scattered into the logits, which are still needed and would be copied.
    """
    # Padding would wrap to the last token; past the end it is dropped.
    places = jnp.where(ids < 0, shape[-1], ids)
    rows = jnp.arange(shape[0])[:, None]
    return jnp.broadcast_to(neutral, shape).at[rows, places].set(values, mode="drop")


def _top_k_check(value: Any) -> str | None:
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    is_valid = is_int and (value == -1 or 1 <= value < 2**31)
    return None if is_valid else "must be -1 (off) or an integer of at least 1"


def _ordered(x: Float[Array, "B V"]) -> UInt[Array, "B V"]:
    """Unsigned integers in the order of the floats: sign-magnitude made two's complement."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


type Thresholds = tuple[UInt[Array, " B"], UInt[Array, " B"]]


def _largest_thresholds(
    hold: Callable[..., tuple[Bool[Array, " B"], Bool[Array, " B"]]], num_rows: int
) -> Thresholds:
    """The largest thresholds for which two monotone predicates hold, bit by bit; no sort.

    Both searches share their 32 passes over the logits.
    """

    def try_bit(i: Int[Array, ""], found: Thresholds) -> Thresholds:
        bit = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
        candidates = [t | bit for t in found]
        held = hold(*candidates)
        first, second = (
            jnp.where(h, c, t) for h, c, t in zip(held, candidates, found, strict=True)
        )
        return first, second

    zeros = jnp.zeros((num_rows,), jnp.uint32)
    return jax.lax.fori_loop(0, 32, try_bit, (zeros, zeros))
