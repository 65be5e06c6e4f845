"""What several of the built-in transforms share: checks, searches without a sort, token lists."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.contract import name_of
from jaxengine.sampling.transforms import Logits, LogitsTransform, State, when
from jaxengine.types import Param

SMALLEST = float(np.nextafter(0.0, 1.0))
LARGEST = float(np.finfo(np.float32).max)


def number_in(low: float, high: float, clause: str) -> Callable[[Any], str | None]:
    """A `Param.check` for numbers in [low, high]."""

    def check(value: Any) -> str | None:
        is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
        return None if is_number and low <= value <= high else clause

    return check


def integer_in(low: int, high: int, clause: str) -> Callable[[Any], str | None]:
    """A `Param.check` for integers in [low, high]."""

    def check(value: Any) -> str | None:
        is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        return None if is_int and low <= value <= high else clause

    return check


def entropy(logits: Logits) -> Float[Array, "*B"]:
    """Of softmax(logits), in nats; removed tokens add nothing."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0).sum(axis=-1)


type Rows = Callable[[SamplingContext], Bool[Array, " B"]]
type Bounds = tuple[Float[Array, " B"] | float, Float[Array, " B"] | float]


def keep_between(
    bounds: Callable[[Logits, State, SamplingContext], Bounds], is_on: Rows, **fields: Any
) -> LogitsTransform:
    """Keeps the logits in [low, high]; `bounds(logits, state, ctx)` gives both.

    Not behind a condition, whose operand would be a copy of the logits. NaN stays, for the draw to
    report it.
    """

    def apply(logits: Logits, state: State, ctx: SamplingContext) -> Logits:
        low, high = (
            jnp.broadcast_to(bound, logits.shape[:1]) for bound in bounds(logits, state, ctx)
        )
        is_out = (logits < low[:, None]) | (logits > high[:, None])
        return jnp.where(is_out, -jnp.inf, logits)

    apply.__qualname__ = name_of(bounds)
    return when(is_on, LogitsTransform(apply, is_filter=True, **fields))


def keep_from(
    lowest: Callable[[Logits, State, SamplingContext], Float[Array, " B"]],
    is_on: Rows,
    **fields: Any,
) -> LogitsTransform:
    """Keeps the logits from `lowest(logits, state, ctx)` up, and always the largest."""

    def bounds(logits: Logits, state: State, ctx: SamplingContext) -> Bounds:
        return jnp.minimum(lowest(logits, state, ctx), logits.max(axis=-1)), jnp.inf

    bounds.__qualname__ = name_of(lowest)
    return keep_between(bounds, is_on, **fields)


def scatter_ids(
    ids: Int[Array, "B n"], values: Array, neutral: Array, shape: tuple[int, ...]
) -> Array:
    """`neutral` [B, V] but for `values` at the given ids; -1 is padding.

    Not scattered into the logits, which are still needed and would be copied.
    """
    # Padding would wrap to the last token; past the end it is dropped.
    places = jnp.where(ids < 0, shape[-1], ids)
    rows = jnp.arange(shape[0])[:, None]
    return jnp.broadcast_to(neutral, shape).at[rows, places].set(values, mode="drop")


def is_listed(ids: Int[Array, "B n"], logits: Float[Array, "B V"]) -> Bool[Array, "B V"]:
    """Which tokens are among the given ids; -1 is padding."""
    return scatter_ids(ids, jnp.ones((), bool), jnp.zeros((), bool), logits.shape)


def token_list(limit: int, what: str, spell: Callable[[str, Any], int] | None = None) -> Param:
    """A parameter that lists up to `limit` token ids; the default, none, is off.

    Args:
      limit: Most ids of one request.
      what: Names them in messages.
      spell: (text, tokenizer) -> id, where strings may stand for ids.
    """

    def encode(value: Any, tokenizer: Any) -> np.ndarray:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise TypeError(f"{what} are a list")
        items = list(value)
        if len(items) > limit:
            raise ValueError(f"at most {limit} {what}, has {len(items)}")
        return np.asarray([_token_id(x, tokenizer, what, spell) for x in items], np.int32)

    return Param("int32", (), shape=(limit,), pad=-1, encode=encode)


def _token_id(
    value: Any, tokenizer: Any, what: str, spell: Callable[[str, Any], int] | None
) -> int:
    if isinstance(value, str) and spell is not None:
        return spell(value, needed(tokenizer, what))
    return as_token_id(value, what)


def as_token_id(value: Any, what: str) -> int:
    """The value, if it can be a token id.

    Raises:
      TypeError: If it cannot.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise TypeError(f"{what} are token ids of at least 0, not {value!r}")
    return int(value)


def needed(tokenizer: Any, what: str) -> Any:
    """The tokenizer, where strings have to become tokens.

    Raises:
      ValueError: If there is none.
    """
    if tokenizer is None:
        raise ValueError(f"{what} as strings need a tokenizer; give token ids")
    return tokenizer
