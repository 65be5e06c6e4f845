"""Against repetition: what would repeat the text so far is made less likely, or forbidden."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.sampling.builtin.common import (
    LARGEST,
    integer_in,
    is_listed,
    number_in,
    token_list,
)
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import Logits, LogitsTransform, Needs, State, when
from jaxengine.types import Param

MAX_WINDOW = 1024
"""Tokens of prompt and output in which repetition is looked for."""

MAX_REPEAT = 64
"""Longer repeats count as this long."""

MAX_DRY_BREAKERS = 16
"""Most sequence breakers of one request."""


def dry(max_window: int = MAX_WINDOW, max_breakers: int = MAX_DRY_BREAKERS) -> LogitsTransform:
    """Lowers tokens that would continue a repeat of n tokens by multiplier * base^(n - allowed).

    n counts the tokens before, from `dry_allowed_length` up, in the last `dry_penalty_last_n`
    tokens (-1 is all of `max_window`; 0 is off). No repeat reaches over a token of
    `dry_sequence_breakers`: ids, or strings, of which the last token counts. A `dry_multiplier`
    of 0 is off.

    Source: P. E. Weidmann, text-generation-webui pull request 5677; llama.cpp `dry`.
    """

    def is_on(ctx: SamplingContext) -> Bool[Array, " B"]:
        return (ctx.dry_multiplier > 0) & (ctx.dry_penalty_last_n != 0)

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        is_breaker = (ctx.history[:, :, None] == ctx.dry_sequence_breakers[:, None, :]).any(-1)
        age = jnp.arange(max_window, 0, -1)
        window = jnp.where(ctx.dry_penalty_last_n < 0, max_window, ctx.dry_penalty_last_n)
        is_seen = is_on(ctx)[:, None] & (age <= window[:, None]) & ~is_breaker
        tokens = jnp.where(is_seen, ctx.history, -1)
        n = _longest(tokens, repeats(tokens, MAX_REPEAT), logits)
        allowed = ctx.dry_allowed_length[:, None]
        penalty = ctx.dry_multiplier[:, None] * ctx.dry_base[:, None] ** (n - allowed)
        return jnp.where(n >= allowed, logits - penalty, logits)

    length = integer_in(1, MAX_REPEAT, f"must be an integer in [1, {MAX_REPEAT}]")
    last_n = integer_in(-1, max_window, f"must be an integer in [-1, {max_window}]")
    params = {
        "dry_multiplier": Param("float32", 0.0, number_in(0.0, LARGEST, "must be at least 0")),
        "dry_base": Param("float32", 1.75, number_in(1.0, LARGEST, "must be at least 1")),
        "dry_allowed_length": Param("int32", 2, length),
        "dry_penalty_last_n": Param("int32", -1, last_n),
        "dry_sequence_breakers": token_list(max_breakers, "sequence breakers", _last_token),
    }
    return when(is_on, LogitsTransform(apply, params=params, needs=Needs(history=max_window)))


def no_repeat_ngram(max_window: int = MAX_WINDOW) -> LogitsTransform:
    """Forbids to repeat any `no_repeat_ngram_size` tokens of the last `max_window`; 0 is off.

    Source: Paulus et al., A Deep Reinforced Model for Abstractive Summarization, arXiv:1705.04304,
    section 2.5 (trigrams); prompt included, as transformers.
    """

    def is_on(ctx: SamplingContext) -> Bool[Array, " B"]:
        return ctx.no_repeat_ngram_size > 0

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        tokens = jnp.where(is_on(ctx)[:, None], ctx.history, -1)
        is_repeat = repeats(tokens, MAX_REPEAT) >= ctx.no_repeat_ngram_size[:, None] - 1
        return jnp.where(is_listed(jnp.where(is_repeat, tokens, -1), logits), -jnp.inf, logits)

    size = integer_in(0, MAX_REPEAT, f"must be an integer in [0, {MAX_REPEAT}]")
    params = {"no_repeat_ngram_size": Param("int32", 0, size)}
    return when(is_on, LogitsTransform(apply, params=params, needs=Needs(history=max_window)))


def repeats(history: Int[Array, "B H"], limit: int) -> Int[Array, "B H"]:
    """How many tokens before each one equal those at the end, at most `limit`; -1 equals nothing.

    So many would be repeated if the token were drawn now:
        a b c c b c y a b c
        0 0 0 3 1 0 2 0 0 0
    One pass over the history for every token of the longest repeat.
    """

    def more(found: tuple[Array, Array, Array]) -> Bool[Array, ""]:
        n, still, _ = found
        return (n < limit) & still.any()

    def step(found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        n, still, length = found
        before = jax.lax.dynamic_slice_in_dim(padded, limit - 1 - n, width, axis=1)
        end = jax.lax.dynamic_slice_in_dim(padded, limit + width - 1 - n, 1, axis=1)
        still &= (before == end) & (end >= 0)
        return n + 1, still, length + still

    width = history.shape[1]
    padded = jnp.pad(history, ((0, 0), (limit, 0)), constant_values=-1)
    nothing = jnp.zeros(history.shape, jnp.int32)
    return jax.lax.while_loop(more, step, (jnp.int32(0), nothing == 0, nothing))[2]


def _longest(
    tokens: Int[Array, "B H"], lengths: Int[Array, "B H"], logits: Float[Array, "B V"]
) -> Int[Array, "B V"]:
    """The largest length that stands at each token of the vocabulary; 0 where none does."""
    places = jnp.where(tokens < 0, logits.shape[1], tokens)  # past the end: dropped
    rows = jnp.arange(tokens.shape[0])[:, None]
    nothing = jnp.zeros(logits.shape, jnp.int8)
    longest = nothing.at[rows, places].max(lengths.astype(jnp.int8), mode="drop")
    return longest.astype(jnp.int32)


def _last_token(text: str, tokenizer: Any) -> int:
    """The token a text ends with; alone it might be spelled as a word's beginning is."""
    return tokenizer.encode("a" + text, add_special_tokens=False)[-1]
