"""Hard constraints: tokens that may not, may only, or must be drawn."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxengine.sampling.builtin.common import (
    as_token_id,
    integer_in,
    is_listed,
    needed,
    token_list,
)
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.transforms import Drawn, Logits, LogitsTransform, Needs, State, when
from jaxengine.types import Param

MAX_BAD_WORDS = 64
"""Most token sequences `bad_words` of one request may make; a string makes up to two."""

MAX_BAD_WORD_LENGTH = 8
"""Most tokens of one bad word."""

MAX_ALLOWED_TOKENS = 256
"""Most tokens `allowed_token_ids` of one request may name."""

MAX_FORCED_TOKENS = 1024
"""Most tokens `forced_token_ids` of one request may name."""


def bad_words(
    max_words: int = MAX_BAD_WORDS, max_length: int = MAX_BAD_WORD_LENGTH
) -> LogitsTransform:
    """Forbids the last token of each sequence of `bad_words` where the text ends with the others.

    `bad_words` is a list of strings, each meant with and without a space before it, or of lists of
    token ids.

    Raises:
      ValueError: If `max_length` is below 2.
    """
    if max_length < 2:
        raise ValueError(f"`max_length` must be at least 2, got {max_length}.")

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        before, last = ctx.bad_words[:, :, :-1], ctx.bad_words[:, :, -1]
        is_near = ((before == ctx.history[:, None, :]) | (before < 0)).all(axis=-1)
        return jnp.where(is_listed(jnp.where(is_near, last, -1), logits), -jnp.inf, logits)

    def encode(value: Any, tokenizer: Any) -> np.ndarray:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError("bad words are a list of strings or of lists of token ids")
        words = [ids for word in value for ids in _spellings(word, tokenizer)]
        if len(words) > max_words:
            raise ValueError(f"at most {max_words} token sequences, has {len(words)}")
        array = np.full((len(words), max_length), -1, np.int32)
        for row, ids in zip(array, words, strict=True):
            if not 1 <= len(ids) <= max_length:
                raise ValueError(f"a bad word has 1 to {max_length} tokens, one has {len(ids)}")
            row[max_length - len(ids) :] = ids
        return array

    shape = (max_words, max_length)
    params = {"bad_words": Param("int32", None, shape=shape, pad=-1, encode=encode)}
    transform = LogitsTransform(apply, params=params, needs=Needs(history=max_length - 1))
    return when(lambda ctx: ctx.bad_words[:, 0, -1] >= 0, transform)


def _spellings(word: Any, tokenizer: Any) -> list[list[int]]:
    """The token sequences a bad word stands for."""
    if not isinstance(word, str):
        return [[as_token_id(token_id, "bad words") for token_id in word]]
    spell = needed(tokenizer, "bad words").encode
    bare = word.lstrip(" ")
    spellings = [spell(text, add_special_tokens=False) for text in (bare, " " + bare)]
    return spellings if spellings[0] != spellings[1] else spellings[:1]


def allowed_tokens(max_tokens: int = MAX_ALLOWED_TOKENS) -> LogitsTransform:
    """Keeps the tokens of `allowed_token_ids` only; none named is off."""

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        return jnp.where(is_listed(ctx.allowed_token_ids, logits), logits, -jnp.inf)

    params = {"allowed_token_ids": token_list(max_tokens, "allowed tokens")}
    return when(lambda ctx: ctx.allowed_token_ids[:, 0] >= 0, LogitsTransform(apply, params=params))


def forced_tokens(max_tokens: int = MAX_FORCED_TOKENS) -> LogitsTransform:
    """Draws `forced_token_ids` one after another, then goes on freely; none is off.

    A replay: put last, so that the logprobs reported are those of the chain before it, as they
    were when the tokens were drawn; limit `max_new_tokens` to end with it.
    """

    def next_forced(ctx: SamplingContext) -> Int[Array, " B"]:
        place = jnp.minimum(ctx.num_generated, max_tokens - 1)[:, None]
        token = jnp.take_along_axis(ctx.forced_token_ids, place, axis=1)[:, 0]
        return jnp.where(ctx.num_generated < max_tokens, token, -1)

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        return only(next_forced(ctx), logits)

    params = {"forced_token_ids": token_list(max_tokens, "forced tokens")}
    return when(
        lambda ctx: next_forced(ctx) >= 0, LogitsTransform(apply, params=params, is_filter=True)
    )


def thinking_budget(
    start_id: int, end_id: int, newline_id: int, prompt_window: int = 64
) -> LogitsTransform:
    """Ends a thought after `thinking_budget` tokens: with a newline, then the end token; -1 is off.

    A thought begins with `start_id`, in the output or open in the last `prompt_window` tokens of
    the prompt, and each has the whole budget. The newline is left out after another.

    Args:
      start_id: Of the token that begins a thought, "<think>" say.
      end_id: Of the one that ends it.
      newline_id: Of a line break.
      prompt_window: How far back in the prompt an open thought is looked for.

    Source: SGLang `ThinkingBudgetLogitProcessor`.
    """

    def init(ctx: SamplingContext) -> Int[Array, " B"]:
        places = jnp.arange(prompt_window)
        end = jnp.where(ctx.history == end_id, places, -1).max(axis=-1, keepdims=True)
        is_start = (ctx.history == start_id) & (places > end)
        start = jnp.where(is_start, places, prompt_window).min(axis=-1)
        return jnp.where(start < prompt_window, prompt_window - 1 - start, -1)

    def apply(logits: Logits, spent: State, ctx: SamplingContext) -> Logits:
        is_over = (spent >= 0) & (spent >= ctx.thinking_budget)
        token = jnp.where(ctx.last_token == newline_id, end_id, newline_id)
        return jnp.where(is_over[:, None], only(token, logits), logits)

    def update(spent: State, drawn: Drawn, ctx: SamplingContext) -> Int[Array, " B"]:
        outside = jnp.where(drawn.token == start_id, 0, -1)
        inside = jnp.where(drawn.token == end_id, -1, spent + 1)
        return jnp.where(spent < 0, outside, inside)

    check = integer_in(-1, 2**31 - 1, "must be -1 (off) or an integer of at least 0")
    params = {"thinking_budget": Param("int32", -1, check)}
    needs = Needs(history=prompt_window)
    transform = LogitsTransform(apply, init, update, params=params, needs=needs)
    return when(_has_budget, transform)


def _has_budget(ctx: SamplingContext) -> Bool[Array, " B"]:
    return ctx.thinking_budget >= 0


def only(token: Int[Array, " B"], logits: Logits) -> Logits:
    """Logits that leave one token, whatever was removed before."""
    return jnp.where(jnp.arange(logits.shape[-1]) == token[:, None], 0.0, -jnp.inf)
