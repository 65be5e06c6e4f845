"""What single arguments of `generate` must be; errors name the argument, and the prompt by index.

Every check raises RequestError. Knows nothing of tokenising and of jax.
"""

import array
import math
import os
import reprlib
from collections.abc import Callable, Hashable
from numbers import Integral
from typing import Any

import numpy as np

from jaxengine.errors import RequestError
from jaxengine.types import MAX_LOGPROB_IDS, HiddenStates

INT32_MAX = 2**31 - 1


def place_of(name: str, index: int, is_list: bool) -> str:
    """How messages name an argument of one prompt."""
    return f"`{name}` of prompt {index}" if is_list else f"`{name}`"


def texts(prompt: Any, is_list: bool, tokenizer: Any) -> list[Any]:
    """The prompts of a call; what they are is looked at one by one."""
    prompts = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    prompts = prompts if is_list else [prompts]
    if not isinstance(prompts, list | tuple):
        got = type(prompt).__name__
        raise RequestError(f"`prompt` must be a string or a list of strings, got {got}.")
    if tokenizer is None and any(isinstance(text, str) and text for text in prompts):
        raise RequestError(
            "`prompt` needs a tokenizer, and this engine was made with skip_tokenizer_init=True. "
            "Pass `input_ids`, or make the engine with a tokenizer."
        )
    return list(prompts)


def checked_text(text: Any, index: int, is_list: bool) -> str:
    """A prompt that is a text."""
    place = f"Prompt {index}" if is_list else "`prompt`"
    if not isinstance(text, str):
        remedy = " Token ids go into `input_ids`." if isinstance(text, Integral | list) else ""
        raise RequestError(f"{place} must be a string, got {type(text).__name__}.{remedy}")
    if not text:
        raise RequestError(f"{place} is empty; it needs at least one character.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"at character {error.start}"
        raise RequestError(f"{place} holds half a surrogate pair {where}.") from None
    return text


def is_list_of_prompts(input_ids: Any) -> bool:
    """Whether `input_ids` are those of several prompts."""
    if hasattr(input_ids, "ndim"):
        return input_ids.ndim > 1
    if not isinstance(input_ids, list | tuple):
        got = type(input_ids).__name__
        raise RequestError(f"`input_ids` must be a list of ids or a list of such lists, got {got}.")
    return len(input_ids) > 0 and (
        isinstance(input_ids[0], list | tuple) or getattr(input_ids[0], "ndim", 0) > 0
    )


def token_ids(ids: Any, place: str, vocab_size: int) -> np.ndarray:
    """Ids of one prompt, each in the vocabulary."""
    if hasattr(ids, "ndim"):
        row = np.asarray(ids)
        if row.ndim != 1 or (row.dtype.kind not in "iu" and row.size):
            got = f"shape {row.shape} and dtype {row.dtype}"
            raise RequestError(f"{place} must be a row of integers, got an array of {got}.")
    elif isinstance(ids, list | tuple):
        row = _unsigned(ids)
    else:
        raise RequestError(f"{place} must be a list of ids, got {type(ids).__name__}.")
    if not len(ids):
        raise RequestError(f"{place} is empty; a prompt needs at least one token.")
    low = -1 if row is None else int(row.min())
    if low <= 1:  # a bool has become 0 or 1
        _refuse_others(ids, place)
    if row is None or low < 0 or int(row.max()) >= vocab_size:
        position, bad = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocab_size)
        got = f"got {bad} at position {position}"
        raise RequestError(f"{place} must be in the vocabulary, [0, {vocab_size}); {got}.")
    return row.astype(np.int32)


def _unsigned(ids: list[Any] | tuple[Any, ...]) -> np.ndarray | None:
    """A list of integers as uint32; None if something in it is none, or does not fit."""
    try:
        # Of 512 ids in 4 us, where numpy takes 16 to read a list, and "i" 11.
        return np.asarray(array.array("I", ids))
    except (OverflowError, TypeError):
        return None


def _refuse_others(ids: Any, place: str) -> None:
    if hasattr(ids, "ndim") or set(map(type, ids)) == {int}:
        return
    for position, token_id in enumerate(ids):
        if not isinstance(token_id, Integral) or isinstance(token_id, bool):
            got = f"{reprlib.repr(token_id)} at position {position}"
            raise RequestError(f"{place} must hold integers only, got {got}.")


def is_list_of_embeds(value: Any) -> bool:
    """Whether `input_embeds` are those of several prompts."""

    def depth(x: Any) -> int:
        if hasattr(x, "ndim"):
            return x.ndim
        return 1 + depth(x[0]) if isinstance(x, list | tuple) and x else 0

    return depth(value) == 3 or (isinstance(value, list | tuple) and not value)


def embeds(value: Any, place: str, hidden_size: int) -> np.ndarray:
    """Float32 [tokens, D] of one prompt."""
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{place}: {error}.") from None
    if array.ndim != 2 or not len(array) or array.shape[1] != hidden_size:
        raise RequestError(
            f"{place} must be an array [tokens, {hidden_size}] with at least one token, got shape "
            f"{array.shape}."
        )
    if not np.isfinite(array).all():
        raise RequestError(f"{place} must be finite.")
    return array


def hidden_states(kind: Any, place: str) -> HiddenStates | None:
    """Which hidden states are reported, if any."""
    kinds: dict[Any, HiddenStates | None] = {
        None: None,
        False: None,
        True: "all",
        "last": "last",
        "mean": "mean",
    }
    if not isinstance(kind, Hashable) or kind not in kinds:
        raise RequestError(f'{place} must be True, False, "last" or "mean", got {kind!r}.')
    return kinds[kind]


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """One of some words."""
    if value not in choices:
        raise RequestError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def flag(value: Any, place: str) -> bool:
    """A bool."""
    if not isinstance(value, bool | np.bool_):
        raise RequestError(f"{place} must be True or False, got {value!r}.")
    return bool(value)


def integer(value: Any, place: str, low: int, high: int) -> int | None:
    """An integer in [low, high], or None."""
    if value is None:
        return None
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or not low <= value <= high:
        raise RequestError(f"{place} must be an integer in [{low}, {high}], got {value!r}.")
    return int(value)


def timeout(value: Any, place: str) -> float | None:
    """Seconds, or None."""
    if value is None:
        return None
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise RequestError(f"{place} must be a positive number of seconds, got {value!r}.")
    return float(value)


def namespace(salt: Any, key: Any, place: Callable[[str], str]) -> Hashable:
    """Of the prefix cache: what SGLang makes of salt and key together; None of neither."""
    for name, value in (("cache_salt", salt), ("extra_key", key)):
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{place(name)} must be a string, got {value!r}.")
    return (salt, key) if salt or key else None


def logprob_rows(value: Any, count: int, is_list: bool) -> list[Any]:
    """One list of ids for each prompt; () where none are wanted."""
    if value is None or len(value) == 0:
        return [()] * count
    nested = [isinstance(item, list | tuple | np.ndarray) or item is None for item in value]
    rows = list(value) if any(nested) else [value] * count
    if any(nested) and (not is_list or len(rows) != count):
        raise RequestError(f"`token_ids_logprob` has {len(rows)} lists for {count} prompts.")
    return rows


def logprob_ids(row: Any, place: str, vocab_size: int) -> tuple[int, ...]:
    """At most MAX_LOGPROB_IDS ids of the vocabulary."""
    ids = [] if row is None or len(row) == 0 else token_ids(row, place, vocab_size)
    if len(ids) > MAX_LOGPROB_IDS:
        raise RequestError(f"{place} has {len(ids)} ids; the limit is {MAX_LOGPROB_IDS}.")
    return tuple(int(token_id) for token_id in ids)


def companion_rows(value: Any, count: int, is_list: bool) -> list[Any]:
    """The companions of each prompt; all prompts have equally many."""
    if value is None:
        return [()] * count
    rows = value if is_list else [value]
    if not isinstance(rows, list | tuple) or len(rows) != count:
        raise RequestError(f"`companions` must hold one list of prompts for each of {count}.")
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) != len(rows[0]) or not row:
            place = place_of("companions", i, is_list)
            raise RequestError(
                f"{place} must be a list of prompts, as many for every prompt and at least one."
            )
    return list(rows)


def companion(prompt: Any, place: str, vocab_size: int, tokenizer: Any) -> str | np.ndarray:
    """A companion: a text, or ids."""
    if isinstance(prompt, str):
        return checked_text(texts(prompt, False, tokenizer)[0], 0, False)
    return token_ids(prompt, place, vocab_size)


def spread(name: str, value: Any, count: int, is_list: bool) -> list[Any]:
    """One value a prompt."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if not is_list:
        raise RequestError(f"`{name}` is a list, but there is one bare prompt; pass a list of one.")
    if len(value) != count:
        raise RequestError(f"`{name}` has {len(value)} entries for {count} prompts.")
    return list(value)


def rids_of(rid: Any, count: int, is_list: bool) -> list[str]:
    """One id a prompt, fresh ones where none are given."""
    if rid is None:
        fresh = os.urandom(16 * count).hex()
        return [fresh[i : i + 32] for i in range(0, len(fresh), 32)]
    if isinstance(rid, str) and rid and is_list:
        return [f"{rid}_{i}" for i in range(count)]
    rids = spread("rid", rid, count, is_list)
    first: dict[str, int] = {}
    for i, name in enumerate(rids):
        if not isinstance(name, str) or not name:
            place = place_of("rid", i, is_list)
            raise RequestError(f"{place} must be a string that is not empty, got {name!r}.")
        if first.setdefault(name, i) != i:
            raise RequestError(f"`rid` {name!r} is given to prompts {first[name]} and {i}.")
    return rids
