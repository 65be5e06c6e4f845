"""Logits transforms and their algebra: what happens between the model and the draw.

A transform is a bundle of pure functions plus the per-request values it needs; `chain` applies
them in the order written. To samplers what optax is to optimisers. The transforms themselves are
in `builtin/`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.contract import call, name_of, require_like, require_rows
from jaxengine.sampling.identity import are_equal
from jaxengine.types import Param

type Logits = Float[Array, "*B V"]
type State = Any
"""A pytree with leading axis B; () when there is none."""


class Needs(NamedTuple):
    """What of the context costs something, so that it must be asked for.

    Attributes:
      history: Tokens of prompt and output in `ctx.history`; longer texts show their end.
      hidden: Fill `ctx.hidden`.
    """

    history: int = 0
    hidden: bool = False


class Drawn(NamedTuple):
    """What was drawn, for `update` and captures.

    Attributes:
      token: The drawn ids.
      logprob: Log-probability of the token in the distribution it was drawn from.
      raw_logprob: The same in the model's own distribution.
      logits: What the token was drawn from: the logits after every transform.
    """

    token: Int[Array, "*B"]
    logprob: Float[Array, "*B"]
    raw_logprob: Float[Array, "*B"]
    logits: Logits


class Filters(NamedTuple):
    """What the op `filter_threshold` keeps.

    Attributes:
      top_k: The k most likely tokens pass; below 1 all do.
      top_p: The smallest set whose probability reaches p passes; from 1 on all do.
      min_p: Tokens at least this many times as likely as the most likely pass.
    """

    top_k: Int[Array, "*B"]
    top_p: Float[Array, "*B"]
    min_p: Float[Array, "*B"]


class LogitsTransform(NamedTuple):
    """A step between the model's logits and the draw. Every function sees the B rows of the step.

    Attributes:
      apply: (logits f32[B, V], state, ctx) -> f32[B, V]; -inf removes a token.
      init: ctx -> state of rows that are about to draw their first token.
      update: (state, drawn, ctx) -> state, after the draw; `ctx` is the one `apply` saw.
      params: Per-request values, by name; they become sampling-parameter keys.
      needs: What `ctx` must hold beside them.
      arrays: Learned weights, a pytree; `ctx.arrays` inside, and replaceable without a recompile.
      is_on: ctx -> bool[B], the rows it changes; None is all of them. A step in which no row of
        any such transform is on takes a path that does not contain them.
      is_filter: Removes tokens rather than reshaping the distribution; SGLang's token logprobs
        are those before the first filter.
      keeps_order: Never changes which token is the most likely, and is cheap, like a temperature:
        it is left out only of steps that are greedy, where `is_on` says so.
      divisor: ctx -> f32[B], positive, if `apply` is nothing but a division by it. At the end of a
        chain kernels then divide as they read.
      filters: ctx -> `Filters`, if `apply` is nothing but these. Likewise.
      stages: The parts of a chain, in order; () for a single transform.
    """

    apply: Callable[[Logits, State, SamplingContext], Logits]
    init: Callable[[SamplingContext], State] = lambda ctx: ()
    update: Callable[[State, Drawn, SamplingContext], State] = lambda state, drawn, ctx: state
    params: Mapping[str, Param] = {}
    needs: Needs = Needs()
    arrays: Any = ()
    is_on: Callable[[SamplingContext], Bool[Array, "*B"]] | None = None
    is_filter: bool = False
    keeps_order: bool = False
    divisor: Callable[[SamplingContext], Float[Array, "*B"]] | None = None
    filters: Callable[[SamplingContext], Filters] | None = None
    stages: tuple["LogitsTransform", ...] = ()


def chain(*transforms: LogitsTransform) -> LogitsTransform:
    """Applies transforms in the order written; nested chains are flattened.

    Raises:
      ValueError: If two transforms declare the same parameter differently.
    """
    stages = tuple(s for t in transforms for s in (t.stages or (t,)))

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        for stage, stage_state, stage_ctx in each_stage(stages, state, ctx):
            logits = applied(stage, logits, stage_state, stage_ctx)
        return logits

    def init(ctx: SamplingContext) -> State:
        nothing = (None,) * len(stages)
        return tuple(initial(stage, c) for stage, _, c in each_stage(stages, nothing, ctx))

    def update(state: State, drawn: Drawn, ctx: SamplingContext) -> State:
        return tuple(updated(s, x, drawn, c) for s, x, c in each_stage(stages, state, ctx))

    return LogitsTransform(
        apply,
        init,
        update,
        params=merge_params(stages),
        needs=merge_needs(stages),
        arrays=tuple(stage.arrays for stage in stages),
        stages=stages,
    )


def applied(stage: LogitsTransform, logits: Logits, state: State, ctx: SamplingContext) -> Logits:
    """What one transform makes of the logits.

    Raises:
      SamplerError: If that has another shape or dtype.
    """
    changed = call(stage.apply, logits, state, ctx)
    require_like(stage.apply, changed, logits, "the logits")
    return changed


def initial(part: Any, ctx: SamplingContext) -> State:
    """The state a transform or draw begins with.

    Raises:
      SamplerError: If it has not one row for each row of the context.
    """
    state = call(part.init, ctx)
    require_rows(part.init, state, ctx.position.shape, "its state")
    return state


def updated(part: Any, state: State, drawn: Drawn, ctx: SamplingContext) -> State:
    """The state of a transform or draw after a token.

    Raises:
      SamplerError: If it is of another kind than before.
    """
    after = call(part.update, state, drawn, ctx)
    require_like(part.update, after, state, "its state")
    return after


def each_stage(
    stages: tuple[LogitsTransform, ...], states: tuple[State, ...], ctx: SamplingContext
) -> Iterator[tuple[LogitsTransform, State, SamplingContext]]:
    """Every stage of a chain with its own state, and with the context as it sees it."""
    all_arrays = ctx.arrays or tuple(stage.arrays for stage in stages)
    for stage, state, arrays in zip(stages, states, all_arrays, strict=True):
        yield stage, state, ctx.narrowed(stage.needs.history, arrays)


def merge_params(parts: tuple[Any, ...]) -> dict[str, Param]:
    """All parameters of several transforms or draws; a shared name must mean the same thing."""
    merged: dict[str, Param] = {}
    for part in parts:
        for name, param in part.params.items():
            if not are_equal(merged.setdefault(name, param), param):
                raise ValueError(f"two transforms declare the parameter `{name}` differently")
    return merged


def merge_needs(parts: tuple[Any, ...]) -> Needs:
    """What several transforms or draws need together."""
    return Needs(
        max((part.needs.history for part in parts), default=0),
        any(part.needs.hidden for part in parts),
    )


def when(
    predicate: Callable[[SamplingContext], Bool[Array, "*B"]], transform: LogitsTransform
) -> LogitsTransform:
    """Rows where `predicate(ctx)` is False pass unchanged and keep their state.

    A step in which it is False everywhere does not run the transform at all, once the sampler is
    compiled into the windows.
    """

    def is_on(ctx: SamplingContext) -> Bool[Array, "*B"]:
        on = predicate(ctx) & ctx.active
        return on if transform.is_on is None else on & transform.is_on(ctx)

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        return jnp.where(is_on(ctx)[..., None], transform.apply(logits, state, ctx), logits)

    def update(state: State, drawn: Drawn, ctx: SamplingContext) -> State:
        return select_rows(is_on(ctx), transform.update(state, drawn, ctx), state)

    apply.__qualname__ = name_of(transform.apply)
    return transform._replace(
        apply=apply, update=update, is_on=is_on, divisor=None, filters=None, stages=()
    )


def per_row(transform: LogitsTransform) -> LogitsTransform:
    """Lifts a transform written for one row: logits f32[V], scalars in `ctx`, no batch axis."""

    def lifted(function: Callable[..., Any]) -> Callable[..., Any]:
        def over_rows(*args: Any) -> Any:
            *others, ctx = args
            fields = {field.name: getattr(ctx, field.name) for field in dataclasses.fields(ctx)}
            shared = {name: fields.pop(name) for name in ("arrays", "slot_counts")}

            def of_row(*args: Any) -> Any:
                *others, row = args
                return function(*others, SamplingContext(**row, **shared))

            return jax.vmap(of_row)(*others, fields)

        over_rows.__qualname__ = name_of(function)
        return over_rows

    return transform._replace(
        apply=lifted(transform.apply),
        init=lifted(transform.init),
        update=lifted(transform.update),
        is_on=transform.is_on and lifted(transform.is_on),
        divisor=None,
        filters=None,
        stages=(),
    )


def select_rows(mask: Bool[Array, "*B"], yes: Any, no: Any) -> Any:
    """Rows of one pytree where the mask is True, of the other elsewhere."""

    def pick(a: Array, b: Array) -> Array:
        return jnp.where(mask.reshape(*mask.shape, *(1,) * (a.ndim - mask.ndim)), a, b)

    return jax.tree.map(pick, yes, no)
