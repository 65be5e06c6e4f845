"""A sampler: a transform, a draw, and how the engine runs them on the rows of a step."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.sampling.builtin import standard
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.contract import call, require_like, require_rows
from jaxengine.sampling.draw import Draw, gumbel_max
from jaxengine.sampling.logprobs import (
    Wants,
    at_token,
    listed_logprobs,
    no_listed_logprobs,
    no_token_logprobs,
    token_logprob,
    token_logprobs,
)
from jaxengine.sampling.transforms import (
    Drawn,
    LogitsTransform,
    Needs,
    applied,
    chain,
    each_stage,
    initial,
    merge_needs,
    merge_params,
    updated,
)
from jaxengine.types import Param
from pallas_kernels.vocab_blocks import BlockSums, block_sums

type Logits = Float[Array, "B V"]


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
) -> tuple[Sample, SamplerState]:
    """Draws a token for every row and advances the sampler's state.

    Args:
      sampler: Pure functions; traced into the caller.
      logits: The model's, float32.
      state: Of the rows.
      ctx: The rows; its `arrays` are the sampler's, its `history` is `state.history`.
      wants: Which rows want which logprobs; what no row wants is not computed.
      group: For a sampler that combines, the rows of each row's group, its leader first.
    """
    if sampler.combine is not None and group is not None:
        combine = _as_combine(sampler.combine).apply
        combined = call(combine, logits[group], ctx)
        require_like(combine, combined, logits, "the logits")
        logits = combined
    stage_arrays, draw_arrays = ctx.arrays or sampler.arrays
    inside = ctx.narrowed(sampler.needs.history, stage_arrays)
    outside = ctx.narrowed(sampler.draw.needs.history, draw_arrays)
    every = tuple(each_stage(sampler.stages, state.stages, inside))
    routes = _routes(every)
    always = routes[-1].parts

    def draw(parts: Parts, logits: Logits) -> tuple[Sample, SamplerState]:
        processed = _apply(parts, logits)
        token, aux = _selected(sampler.draw, processed, state.draw, outside)
        return finish(parts, logits, processed, token, aux)

    def draw_greedily(logits: Logits) -> tuple[Sample, SamplerState]:
        token = sums.argmax(logits)
        return finish(always, logits, _apply(always, logits), token, ())

    def finish(
        parts: Parts, logits: Logits, processed: Logits, token: Int[Array, " B"], aux: Any
    ) -> tuple[Sample, SamplerState]:
        token = _checked(token, logits, processed)
        if group is not None:  # whatever a companion's own chain would have removed
            token = token[group[:, 0]]
        drawn = Drawn(
            token, token_logprob(processed, token), token_logprob(logits, token), processed
        )
        leaves = {"aux": aux} if jax.tree.leaves(aux) else {}
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

    # A step takes the shortest route that leaves out nothing a row has on. Branches return [B] and
    # state only: returning [B, V] through a branch would copy it.
    choice = jnp.int32(0)
    for i, shorter in enumerate(routes[1:], start=1):
        choice = jnp.where(_is_any_on(every, beside=shorter.parts), choice, i)
    paths: list[Callable[..., Any]] = [functools.partial(draw, route.parts) for route in routes]
    path = choice
    if sampler.draw.is_greedy and all(stage.keeps_order for stage, *_ in always):
        is_random = (~sampler.draw.is_greedy(outside) & ctx.active).any()
        path = jnp.where((choice == len(routes) - 1) & ~is_random, len(paths), choice)
        paths.append(draw_greedily)
    sums = _sums_if((path == len(routes)) | wants.any(ctx.active), logits)
    drawn, after = jax.lax.switch(path, paths, logits)
    logprobs = _logprobs(wants, ctx, logits, sums, routes, choice, drawn.token)
    return drawn._replace(leaves={**logprobs, **drawn.leaves}), after


type Parts = tuple[tuple[LogitsTransform, Any, SamplingContext], ...]


class _Route(NamedTuple):
    """What a step applies to the logits: SGLang's logprobs are those between the two.

    Attributes:
      unfiltered: Parts before the first filter of the chain.
      rest: All others.
    """

    unfiltered: Parts
    rest: Parts

    @property
    def parts(self) -> Parts:
        """All parts, in order."""
        return self.unfiltered + self.rest


def _routes(every: Parts) -> list[_Route]:
    """From all parts to the unconditional ones, each without one more kind that may be off."""
    num_unfiltered = len([*itertools.takewhile(lambda part: not part[0].is_filter, every)])
    kinds: tuple[Callable[[LogitsTransform], bool], ...] = (
        lambda stage: True,
        lambda stage: stage.is_on is None or stage.keeps_order or stage.is_filter,
        lambda stage: stage.is_on is None or stage.keeps_order,
        lambda stage: stage.is_on is None,
    )
    routes: list[_Route] = []
    for is_kept in kinds:
        unfiltered, rest = (
            tuple(part for part in parts if is_kept(part[0]))
            for parts in (every[:num_unfiltered], every[num_unfiltered:])
        )
        route = _Route(unfiltered, rest)
        if not routes or len(route.parts) < len(routes[-1].parts):
            routes.append(route)
    return routes


def _sums_if(is_needed: Bool[Array, ""], logits: Logits) -> BlockSums:
    """What is left of the model's logits, by blocks; zeros where nobody needs it."""
    sums = functools.partial(block_sums, logits)
    nothing = jax.eval_shape(sums)
    return jax.lax.cond(
        is_needed, sums, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)
    )


def _is_any_on(parts: Parts, beside: Parts) -> Bool[Array, ""]:
    """Whether a row has a conditional stage on that is not among those `beside`."""
    others = (part for part in parts if not any(part is other for other in beside))
    is_on = (stage.is_on(ctx).any() for stage, _, ctx in others if stage.is_on)
    return functools.reduce(jnp.logical_or, is_on)


def _apply(parts: Parts, logits: Logits) -> Logits:
    for stage, state, ctx in parts:
        logits = applied(stage, logits, state, ctx)
    return logits


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


def _logprobs(
    wants: Wants,
    ctx: SamplingContext,
    logits: Logits,
    sums: BlockSums,
    routes: Sequence[_Route],
    choice: Int[Array, ""],
    token: Int[Array, " B"],
) -> dict[str, Array]:
    """Of the token by all three measures, and of the most likely and of given ids by SGLang's.

    SGLang's is after penalties, bias and temperature and before the filters. What the parts make of
    the logits is made anew: a branch that took it would have it kept when nobody asks.
    """
    unfiltered = {len(route.unfiltered): route.unfiltered for route in routes}
    place = jnp.asarray([[*unfiltered].index(len(route.unfiltered)) for route in routes])

    def of_token(route: _Route) -> dict[str, Array]:
        raw = at_token(logits, token) - sums.log_total
        changed, x = [], logits
        for parts in route:
            if parts:
                x = _apply(parts, x)
                changed.append(x)
        measures = [raw, *token_logprobs(token, *changed)]
        return {
            "logprob": measures[1 if route.unfiltered else 0],
            "raw_logprob": raw,
            "processed_logprob": measures[-1],
        }

    def of_lists(parts: Parts) -> dict[str, Array]:
        if not parts:
            return listed_logprobs(logits, sums, wants)
        x = _apply(parts, logits)
        return listed_logprobs(x, block_sums(x, implementation="reference"), wants)

    def wanted(rows: Bool[Array, " B"] | None, index: Array, ways: list[Any], nothing: Any) -> Any:
        if rows is None:
            return nothing
        index = jnp.where((rows & ctx.active).any(), index, len(ways))
        return jax.lax.switch(index, [*ways, lambda: nothing])

    by_token = [functools.partial(of_token, route) for route in routes]
    by_lists = [functools.partial(of_lists, parts) for parts in unfiltered.values()]
    return {
        **wanted(wants.token, choice, by_token, no_token_logprobs(token)),
        **wanted(wants.lists, place[choice], by_lists, no_listed_logprobs(wants)),
    }
