"""Routes through a chain: a step takes the shortest that leaves out nothing a row has on."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import LogitsTransform, applied

type Logits = Float[Array, "B V"]
type Part = tuple[LogitsTransform, Any, SamplingContext]
"""A stage with its state, and with the context as it sees it."""
type Parts = tuple[Part, ...]


class Route(NamedTuple):
    """What a step applies to the logits; SGLang's logprobs are those between the two.

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


def routes_of(every: Parts) -> list[Route]:
    """From all parts to those that are never left out, each without one more kind of them."""
    num_unfiltered = len([*itertools.takewhile(lambda part: not part[0].is_filter, every)])
    kinds: tuple[Callable[[LogitsTransform], bool], ...] = (
        lambda stage: True,
        lambda stage: stage.is_on is None or stage.keeps_order or stage.is_filter,
        lambda stage: stage.is_on is None or stage.keeps_order,
    )
    routes: list[Route] = []
    for is_kept in kinds:
        unfiltered, rest = (
            tuple(part for part in parts if is_kept(part[0]))
            for parts in (every[:num_unfiltered], every[num_unfiltered:])
        )
        route = Route(unfiltered, rest)
        if not routes or len(route.parts) < len(routes[-1].parts):
            routes.append(route)
    return routes


def shortest(routes: Sequence[Route]) -> Int[Array, ""]:
    """Which of them to take."""
    every, choice = routes[0].parts, jnp.int32(0)
    for i, route in enumerate(routes[1:], start=1):
        kept = {id(part) for part in route.parts}
        left_out = tuple(part for part in every if id(part) not in kept)
        choice = jnp.where(is_any_on(left_out), choice, i)
    return choice


def is_any_on(parts: Parts) -> Bool[Array, ""]:
    """Whether a row has one of them on."""
    is_on = (
        jnp.array(True) if stage.is_on is None else stage.is_on(ctx).any()
        for stage, _, ctx in parts
    )
    return functools.reduce(jnp.logical_or, is_on, jnp.array(False))


def apply(parts: Parts, logits: Logits) -> Logits:
    """What they make of the logits, one after the other."""
    for stage, state, ctx in parts:
        logits = applied(stage, logits, state, ctx)
    return logits
