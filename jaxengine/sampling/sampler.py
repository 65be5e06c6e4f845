"""A sampler: a transform, a draw, and how the engine runs them on the rows of a step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.sampling.builtin import standard
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.contract import call, require_like, require_rows
from jaxengine.sampling.draw import Draw, gumbel_max
from jaxengine.sampling.logprobs import (
    Wants,
    apart,
    at_token,
    listed_if_wanted,
    listed_logprobs,
    no_listed_logprobs,
    no_logprobs,
    one_measure,
    side_by_side,
    three_measures,
    token_logprob,
)
from jaxengine.sampling.routes import Logits, Route, apply, is_any_on, routes_of, shortest
from jaxengine.sampling.tail import left_by, tail_of
from jaxengine.sampling.transforms import (
    Drawn,
    LogitsTransform,
    Needs,
    chain,
    each_stage,
    initial,
    merge_needs,
    merge_params,
    updated,
)
from jaxengine.types import Param
from pallas_kernels.vocab_blocks import block_sums


class Combine(NamedTuple):
    """How the logits of a prompt and of its companions become one distribution.

    Attributes:
      apply: (logits f32[B, G, V], ctx) -> f32[B, V]; the prompt's own come first, and stand in for
        companions a row lacks.
      params: Per-request values, by name; they become sampling-parameter keys.
    """

    apply: Callable[[Float[Array, "B G V"], SamplingContext], Logits]
    params: Mapping[str, Param] = {}


class Sampler(NamedTuple):
    """What turns logits into tokens.

    Attributes:
      transform: Applied to the float32 logits, usually a `chain`.
      draw: Picks the token.
      combine: For requests with `companions`, a `Combine` or its bare function, before the
        transform.
      capture: Name -> fn(logits, drawn, ctx) -> array [B, ...], reported with every token;
        `logits` are the model's (or the combined ones), `drawn.logits` what was drawn from.
    """

    transform: LogitsTransform
    draw: Draw = gumbel_max
    combine: Combine | Callable[[Float[Array, "B G V"], SamplingContext], Logits] | None = None
    capture: Mapping[str, Callable[..., Array]] = {}

    @property
    def params(self) -> Mapping[str, Param]:
        """Sampling-parameter keys this sampler understands."""
        combine = () if self.combine is None else (_as_combine(self.combine),)
        return merge_params((*combine, self.transform, self.draw))

    @property
    def needs(self) -> Needs:
        """What its parts need of the context."""
        return merge_needs((self.transform, self.draw))

    @property
    def stages(self) -> tuple[LogitsTransform, ...]:
        """The transform's parts, in order."""
        return self.transform.stages or (self.transform,)

    @property
    def arrays(self) -> Any:
        """Learned weights of the stages and of the draw: arguments of what is compiled."""
        return tuple(stage.arrays for stage in self.stages), self.draw.arrays


class SamplerState(NamedTuple):
    """What a sampler keeps of each row.

    Attributes:
      history: The last tokens, oldest first, -1 padded; None where nothing needs it.
      stages: State of every stage of the transform.
      draw: State of the draw.
    """

    history: Int[Array, "B H"] | None
    stages: tuple[Any, ...]
    draw: Any


class Sample(NamedTuple):
    """One token per row.

    Attributes:
      token: Drawn ids; a key of `DRAW_ERRORS` where none could be drawn.
      leaves: What else is reported of it, by name, arrays [B, ...]: "logprob", "raw_logprob",
        "processed_logprob", "top_ids", "top_logprobs", "id_logprobs" (0 unless asked for), the
        draw's "aux" and the captures as "capture/NAME".
    """

    token: Int[Array, " B"]
    leaves: Mapping[str, Any]


NAN_TOKEN, NO_TOKEN = -2, -3
"""Keys of `DRAW_ERRORS`."""


def default_sampler() -> Sampler:
    """SGLang's chain in its order: penalties, bias, temperature, then the filters."""
    return Sampler(
        chain(
            standard.additive_penalties(),
            standard.min_new_tokens(),
            standard.repetition_penalty(),
            standard.logit_bias(),
            standard.temperature(),
            standard.top_k_top_p_min_p(),
        )
    )


def as_sampler(value: Any) -> Sampler:
    """A sampler from one, from a transform, from a draw, or from `(logits, ctx) -> token`.

    A draw or function sees the model's own logits, and the default chain's parameters in `ctx`.

    Raises:
      TypeError: For anything else.
    """
    if isinstance(value, Sampler):
        return value
    if isinstance(value, LogitsTransform):
        return Sampler(value)
    if not isinstance(value, Draw):
        if not callable(value):
            kinds = "a Sampler, a LogitsTransform, a Draw or a function (logits, ctx) -> token"
            raise TypeError(f"`sampler` must be {kinds}, got {type(value).__name__}.")
        value = Draw(functools.partial(_call, value))
    params = default_sampler().params
    return Sampler(LogitsTransform(lambda logits, state, ctx: logits, params=params), value)


def _as_combine(value: Combine | Callable[..., Logits]) -> Combine:
    return value if isinstance(value, Combine) else Combine(value)


def _call(function: Callable[..., Any], logits: Logits, state: Any, ctx: SamplingContext) -> Any:
    return function(logits, ctx)


def init_state(sampler: Sampler, ctx: SamplingContext) -> SamplerState:
    """State of rows that are about to draw their first token; `ctx.history` is the prompt's end."""
    stages = sampler.stages
    stage_arrays, draw_arrays = ctx.arrays or sampler.arrays
    inside = ctx.narrowed(sampler.needs.history, stage_arrays)
    nothing = (None,) * len(stages)
    return SamplerState(
        inside.history,
        tuple(initial(stage, c) for stage, _, c in each_stage(stages, nothing, inside)),
        initial(sampler.draw, ctx.narrowed(sampler.draw.needs.history, draw_arrays)),
    )


def sample(
    sampler: Sampler,
    logits: Float[Array, "N V"],
    state: SamplerState,
    ctx: SamplingContext,
    wants: Wants,
    group: Int[Array, "B G"] | None = None,
    *,
    has_shortcuts: bool = True,
) -> tuple[Sample, SamplerState]:
    """Draws a token for every row and advances the sampler's state.

    Args:
      sampler: Pure functions; traced into the caller.
      logits: The model's, float32.
      state: Of the rows.
      ctx: The rows; its `arrays` are the sampler's, its `history` is `state.history`.
      wants: Which rows want which logprobs; what no row wants is not computed.
      group: For a sampler that combines, the rows of each row's group, its leader first.
      has_shortcuts: Steps whose rows have little on, or nothing, have paths of their own, which are
        faster, and take longer to compile.
    """
    if sampler.combine is not None and group is not None:
        combine = _as_combine(sampler.combine).apply
        combined = call(combine, logits[group], ctx)
        require_like(combine, combined, logits, "the logits")
        logits = combined
    stage_arrays, draw_arrays = ctx.arrays or sampler.arrays
    inside = ctx.narrowed(sampler.needs.history, stage_arrays)
    outside = ctx.narrowed(sampler.draw.needs.history, draw_arrays)
    wants = wants.among(ctx.active)
    every = tuple(each_stage(sampler.stages, state.stages, inside))
    routes = routes_of(every) if has_shortcuts else routes_of(every)[:1]
    has_shortcuts = has_shortcuts and all(stage.is_on for stage, *_ in every)
    # All routes or none: a row's token must not depend on the route its step takes.
    tail = tail_of(routes[0])
    has_tail = sampler.draw.by_blocks is not None and tail is not None and tail.pays

    def draw(route: Route, logits: Logits) -> tuple[Sample, SamplerState]:
        tail = tail_of(route) if has_tail else None
        if tail is None or sampler.draw.by_blocks is None:
            processed = apply(route.parts, logits)
            token, aux = _selected(sampler.draw, processed, state.draw, outside)
            measures = functools.partial(_measures, route, logits, wants)
        else:
            left = left_by(tail, logits)
            processed, aux = left.processed(left.logits), ()
            token = sampler.draw.by_blocks(left.kept, left.tokens_of, outside)
            measures = functools.partial(left.measures, logits, wants)
        may_change_nothing = has_shortcuts and route is routes[-1]
        report = functools.partial(_report, route, wants, may_change_nothing, measures)
        return finish(logits, processed, token, aux, report)

    def draw_greedily(has_lists: bool, logits: Logits) -> tuple[Sample, SamplerState]:
        sums = block_sums(logits)

        def report(token: Int[Array, " B"]) -> Int[Array, "B n"]:
            lists = listed_logprobs(logits, sums, wants) if has_lists else no_listed_logprobs(wants)
            return side_by_side(one_measure(token, logits, sums) | lists)

        return finish(logits, logits, sums.argmax(logits), (), report)

    def finish(
        logits: Logits,
        processed: Logits,
        token: Int[Array, " B"],
        aux: Any,
        report: Callable[[Int[Array, " B"]], Int[Array, "B n"]],
    ) -> tuple[Sample, SamplerState]:
        token = _checked(token, logits, processed)
        if group is not None:  # whatever a companion's own chain would have removed
            token = token[group[:, 0]]
        drawn = Drawn(
            token, token_logprob(processed, token), token_logprob(logits, token), processed
        )
        leaves: dict[str, Any] = {_REPORT: report(token)}
        if jax.tree.leaves(aux):
            leaves["aux"] = aux
        for name, function in sampler.capture.items():
            captured = call(function, logits, drawn, outside)
            require_rows(function, captured, logits.shape[:1], f"the capture `{name}`")
            leaves[f"capture/{name}"] = captured
        after = SamplerState(
            _push(state.history, token),
            tuple(updated(stage, s, drawn, c) for stage, s, c in every),
            updated(sampler.draw, state.draw, drawn, outside),
        )
        return Sample(token, leaves), after

    # NOTE: One condition, for in a CUDA graph one takes longer than a small kernel. Branches return
    # [B] and state only: returning [B, V] through a branch would copy it.
    paths: list[Callable[..., Any]] = [functools.partial(draw, route) for route in routes]
    path = shortest(routes)
    if has_shortcuts and sampler.draw.is_greedy:
        is_random = (~sampler.draw.is_greedy(outside) & ctx.active).any()
        is_greedy = ~is_any_on(every) & ~is_random
        path = jnp.where(is_greedy, len(paths), path)
        paths.append(functools.partial(draw_greedily, False))
        if wants.lists is not None:
            path += is_greedy & wants.lists.any()
            paths.append(functools.partial(draw_greedily, True))
    (token, leaves), after = jax.lax.switch(path, paths, logits)
    reported = apart(leaves.pop(_REPORT), wants)
    return Sample(token, reported | leaves), after


_REPORT = "report"
"""The leaf that holds all logprobs while they pass through a branch."""


def _report(
    route: Route,
    wants: Wants,
    may_change_nothing: bool,
    measures: Callable[[Int[Array, " B"], bool], dict[str, Array]],
    token: Int[Array, " B"],
) -> Int[Array, "B n"]:
    """The logprobs that are wanted of a token that was drawn on a route, side by side."""
    ways = [
        lambda: side_by_side(no_logprobs(wants)),
        lambda: side_by_side(measures(token, True)),
    ]
    index = wants.any().astype(jnp.int32)
    if may_change_nothing:
        ways.append(lambda: side_by_side(measures(token, False)))
        index = jnp.where(is_any_on(route.parts), index, 2 * index)
    return jax.lax.switch(index, ways)


def _measures(
    route: Route, logits: Logits, wants: Wants, token: Int[Array, " B"], is_changed: bool
) -> dict[str, Array]:
    """The logprobs of a token; what the parts make of the logits, if anything, is made anew.

    A branch that took it would have it kept when nobody asks.
    """
    if not is_changed:
        sums = block_sums(logits)
        return one_measure(token, logits, sums) | listed_if_wanted(wants, logits, lambda: sums)
    unfiltered = apply(route.unfiltered, logits)
    processed = apply(route.rest, unfiltered)
    sums = functools.partial(block_sums, unfiltered, implementation="reference")
    lists = listed_if_wanted(wants, unfiltered, sums)
    return three_measures(token, logits, unfiltered, processed) | lists


def _selected(
    draw: Draw, logits: Logits, state: Any, ctx: SamplingContext
) -> tuple[Int[Array, " B"], Any]:
    """What a draw picks, and what it reports beside it."""
    selected = call(draw.select, logits, state, ctx)
    token, aux = selected if isinstance(selected, tuple) else (selected, ())
    is_integer = jnp.issubdtype(getattr(token, "dtype", float), jnp.integer)
    wanted = jax.ShapeDtypeStruct(logits.shape[:1], token.dtype if is_integer else jnp.int32)
    require_like(draw.select, token, wanted, "a token for each row")
    require_rows(draw.select, aux, logits.shape[:1], "what it reports")
    return token.astype(jnp.int32), aux


def _checked(token: Int[Array, " B"], logits: Logits, processed: Logits) -> Int[Array, " B"]:
    """The token, or what stands for its absence."""
    is_in_vocab = (token >= 0) & (token < logits.shape[-1])
    is_left = at_token(processed, token) > -jnp.inf
    # argmax takes NaN for the largest, so a NaN anywhere in the row is what was drawn.
    is_nan = jnp.isnan(at_token(logits, token))
    token = jnp.where(is_in_vocab & is_left, token, NO_TOKEN)
    return jnp.where(is_nan, NAN_TOKEN, token)


def _push(history: Int[Array, "B H"] | None, token: Int[Array, " B"]) -> Array | None:
    if history is None:
        return None
    return jnp.concatenate([history[:, 1:], token[:, None]], axis=-1)
