"""Runs samplers on arrays, without an engine: contexts, steps, and a test of what was drawn."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxengine.sampling import Sampler, SamplingContext, as_sampler
from jaxengine.sampling.context import row_keys
from jaxengine.sampling.identity import structure_of
from jaxengine.sampling.logprobs import Wants
from jaxengine.sampling.sampler import Sample, SamplerState, init_state, sample
from jaxengine.types import Param


def values_of(params: Mapping[str, Param], requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the engine makes of requests: every parameter, encoded, padded, one row a request."""
    values = {}
    for name, param in params.items():
        rows = []
        for request in requests:
            value = request.get(name)
            assert value is None or param.check(value) is None, (name, param.check(value))
            if value is None:
                value = param.default
            elif param.encode is not None:
                value = param.encode(value, None)
            row = np.full(param.shape, param.pad, param.dtype)
            if value is not None:
                part = np.asarray(value)
                row[tuple(slice(n) for n in part.shape)] = part
            rows.append(row)
        values[name] = jnp.asarray(np.stack(rows))
    return values


def context(
    sampler: Sampler,
    requests: Sequence[Mapping[str, Any]],
    vocab_size: int,
    *,
    texts: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | np.ndarray | None = None,
    counts: np.ndarray | None = None,
    num_generated: int = 0,
    **changes: Any,
) -> SamplingContext:
    """One row a request, each after its text, a prompt but for its last `num_generated` tokens."""
    rows = len(requests)
    texts = [[0] * 4] * rows if texts is None else texts
    history = sampler.needs.history
    shown = np.full((rows, max(history, 1)), -1, np.int32)
    for row, text in zip(shown, texts, strict=True):
        seen = list(text)[-history:] if history else []
        row[len(row) - len(seen) :] = seen
    lengths = jnp.asarray([len(text) for text in texts], jnp.int32)
    zeros = jnp.zeros(rows, jnp.int32)
    given = np.arange(rows) if seeds is None else np.asarray(seeds)
    seed_lo = jnp.asarray(given, jnp.int32)
    fields: dict[str, Any] = dict(
        values=values_of(sampler.params, requests),
        key=row_keys(zeros, seed_lo, lengths),
        position=lengths,
        num_generated=zeros + num_generated,
        min_new_tokens=zeros,
        last_token=jnp.asarray([text[-1] if len(text) else 0 for text in texts], jnp.int32),
        prompt_len=lengths - num_generated,
        active=zeros == 0,
        stop_token_ids=jnp.full((rows, 2), -1, jnp.int32),
        slots=jnp.arange(rows, dtype=jnp.int32),
        slot_counts=jnp.zeros((rows, vocab_size), jnp.int16)
        if counts is None
        else jnp.asarray(counts, jnp.int16),
        history=jnp.asarray(shown) if history else None,
        arrays=sampler.arrays,
    )
    return SamplingContext(**fields | changes)


def no_wants(rows: int) -> Wants:
    """Nobody wants logprobs."""
    return Wants(jnp.zeros(rows, bool), None, jnp.full((rows, 1), -1, jnp.int32), 1)


_STEPS: dict[Any, Any] = {}


def _compiled(sampler: Sampler) -> Any:
    """A jitted step, one for all equal samplers."""

    @functools.partial(jax.jit, static_argnums=4)
    def run(logits: Any, state: Any, ctx: Any, wants: Any, num_top: int, group: Any) -> Any:
        return sample(
            sampler, logits, state, ctx, Wants(wants[0], wants[1], wants[2], num_top), group
        )

    return _STEPS.setdefault(structure_of(sampler), run)


def step(
    sampler: Any,
    logits: Any,
    ctx: SamplingContext,
    state: SamplerState | None = None,
    wants: Wants | None = None,
    group: Any = None,
) -> tuple[Sample, SamplerState]:
    """One jitted step."""
    sampler = as_sampler(sampler)
    wants = no_wants(len(ctx.position)) if wants is None else wants
    state = init_state(sampler, ctx) if state is None else state
    logits = jnp.asarray(logits, jnp.float32)
    return _compiled(sampler)(logits, state, ctx, wants[:3], wants.num_top, group)


class Draws(NamedTuple):
    """Many draws of each row, every one with a seed of its own.

    Attributes:
      tokens: [rows, draws].
      left: The logits drawn from, [rows, V], the same for all draws of a row unless `is_random`.
    """

    tokens: np.ndarray
    left: np.ndarray


def draw_many(
    transform: Any,
    logits: np.ndarray,
    requests: Sequence[Any],
    num_draws: int,
    *,
    is_random: bool = False,
    **how: Any,
) -> Draws:
    """Draws `num_draws` tokens for every row in one step."""
    sampler = as_sampler(transform)
    sampler = sampler._replace(capture={"left": lambda logits, drawn, ctx: drawn.logits})
    rows = len(requests)
    ctx = context(sampler, requests, logits.shape[-1], **how)
    shared = {"arrays": ctx.arrays, "slot_counts": ctx.slot_counts}
    each = dataclasses.replace(ctx, arrays=(), slot_counts=jnp.zeros((rows, 0), jnp.int16))
    each = jax.tree.map(lambda x: jnp.repeat(x, num_draws, axis=0), each)
    seeds = jnp.arange(1, 1 + rows * num_draws)
    keys = row_keys(0 * seeds, seeds, each.position)
    drawn, _ = step(
        sampler,
        np.repeat(logits, num_draws, axis=0),
        dataclasses.replace(each, key=keys, **shared),
    )
    left = np.asarray(drawn.leaves["capture/left"]).reshape(rows, num_draws, -1)
    assert is_random or (left == left[:, :1]).all()
    return Draws(np.asarray(drawn.token).reshape(rows, num_draws), left[:, 0])


def assert_drawn_from(tokens: np.ndarray, probabilities: np.ndarray, level: float = 1e-4) -> None:
    """Pearson's chi-square test of each row of tokens; the seeds are fixed, so it cannot flake."""
    assert tokens.min() >= 0
    for row, p in zip(tokens, probabilities, strict=True):
        counts = np.bincount(row, minlength=len(p))
        assert counts[p == 0].sum() == 0, f"drew removed tokens {np.flatnonzero(counts * (p == 0))}"
        expected = p * len(row)
        is_common = expected >= 5
        # The rare ones are one cell; left out where even together they are rare.
        observed = np.append(counts[is_common], counts[~is_common].sum())
        expected = np.append(expected[is_common], expected[~is_common].sum())
        if expected[-1] < 5:
            assert observed[-1] < 25, "rare tokens are too common"
            observed, expected = observed[:-1], expected[:-1]
            expected = expected * observed.sum() / expected.sum()
        if len(observed) > 1:
            assert stats.chisquare(observed, expected).pvalue > level, (observed, expected)


class Steps(NamedTuple):
    """Of several steps in a row: arrays [rows, steps]."""

    tokens: np.ndarray
    leaves: Mapping[str, np.ndarray]
    states: Sequence[SamplerState]


def loop(
    sampler: Any,
    logits_of: Any,
    requests: Sequence[Any],
    vocab_size: int,
    num_steps: int,
    *,
    texts: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
) -> Steps:
    """Draws token after token; `logits_of(tokens so far, step) -> [rows, V]` is the model."""
    sampler = as_sampler(sampler)
    rows = len(requests)
    texts = [list(text) for text in ([[0] * 4] * rows if texts is None else texts)]
    state, tokens, leaves, states = None, [], [], []

    for i in range(num_steps):
        ctx = context(sampler, requests, vocab_size, texts=texts, seeds=seeds, num_generated=i)
        drawn, state = step(sampler, logits_of(texts, i), ctx, state)
        states.append(state)
        tokens.append(np.asarray(drawn.token))
        leaves.append(jax.tree.map(np.asarray, drawn.leaves))
        for text, token in zip(texts, tokens[-1], strict=True):
            text.append(int(token))
    stacked = {k: np.stack([x[k] for x in leaves], axis=1) for k in leaves[0] if k != "aux"}
    return Steps(np.stack(tokens, axis=1), stacked, states)
