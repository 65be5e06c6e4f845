"""Readers of single sampling parameters: a value of any type in, a checked one out."""

import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Integral, Real
from typing import Any

import numpy as np

from jaxengine.errors import RequestError
from jaxengine.types import MAX_STOP_TOKEN_IDS, Param

_MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = 3.4028234663852886e38


class _Bad(ValueError):
    """What is wrong with a value, as a clause: "must be an integer"."""


def read(name: str, value: Any, reader: Callable[[Any], Any], place: str) -> Any:
    """What a reader makes of a value.

    Raises:
      RequestError: For a value it does not take.
    """
    try:
        return reader(value)
    except _Bad as bad:
        raise RequestError(f"`{name}`{place} {bad}, got {show(value)}.") from None


def show(value: Any) -> str:
    """A value in a message: short, with its type where that is not plain to see."""
    shown = reprlib.repr(value)
    return shown if isinstance(value, Real) else f"{shown} ({type(value).__name__})"


def host_readers(specs: Mapping[str, Param], vocab_size: int) -> dict[str, Callable[[Any], Any]]:
    """Readers of the parameters that the host acts on, and of `logit_bias`."""
    max_biases = specs["logit_bias_ids"].shape[0] if "logit_bias_ids" in specs else 0
    seed = _integer_in(0, 2**63 - 1, "must be an integer in [0, 2**63)")
    return {
        "max_new_tokens": lambda value: None if value is None else _count(value),
        "min_new_tokens": _count,
        "logit_bias": lambda value: _logit_bias(value, vocab_size, max_biases),
        "n": _integer_in(1, None, "must be an integer of at least 1"),
        "stop": _stop_strings,
        "stop_regex": _stop_strings,
        "stop_token_ids": lambda value: _stop_token_ids(value, vocab_size),
        "ignore_eos": _boolean,
        "skip_special_tokens": _boolean,
        "spaces_between_special_tokens": _boolean,
        "no_stop_trim": _boolean,
        "stream_interval": _integer_in(1, None, "must be an integer of at least 1"),
        "seed": seed,
        "sampling_seed": seed,
        "seed_mode": _seed_mode,
    }


def _is_number(value: Any, kind: type) -> bool:
    # To ask an abstract class takes ten times as long, and this is asked for every prompt.
    if type(value) is int or (type(value) is float and kind is Real):
        return True
    return isinstance(value, kind) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _integer_in(low: int, high: int | None, clause: str) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not _is_number(value, Integral) or value < low or (high is not None and value > high):
            raise _Bad(clause)
        return int(value)

    return read


_count = _integer_in(0, None, "must be an integer of at least 0")


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _Bad("must be True or False")
    return bool(value)


def _seed_mode(value: Any) -> str:
    if value not in ("derived", "exact"):
        raise _Bad('must be "derived" or "exact"')
    return value


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
        raise _Bad("must be a string or a list of strings, none of them empty")
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    clause = f"must be a list of token ids in [0, {vocab_size})"
    if not isinstance(value, list | tuple | set | frozenset | np.ndarray):
        raise _Bad(clause)
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise _Bad(f"must have at most {MAX_STOP_TOKEN_IDS} entries, has {len(value)}")
    read = _integer_in(0, vocab_size - 1, clause)
    return tuple(dict.fromkeys(read(token_id) for token_id in value if token_id is not None))


def _logit_bias(value: Any, vocab_size: int, max_biases: int) -> dict[int, float]:
    clause = f"must map token ids in [0, {vocab_size}) to finite numbers"
    if not isinstance(value, Mapping):
        raise _Bad(clause)
    if len(value) > max_biases:
        raise _Bad(f"must have at most {max_biases} entries, has {len(value)}")
    biases = {}
    for key, bias in value.items():
        token_id: Any = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not _is_number(token_id, Integral) or not 0 <= token_id < vocab_size:
            raise _Bad(f"{clause}; key {key!r} is none")
        if not _is_number(bias, Real) or not abs(_plain(bias)) <= _MAX_FLOAT32:
            raise _Bad(f"{clause}; {bias!r} is none")
        biases[int(token_id)] = float(bias)
    return biases


def param_value(param: Param, value: Any, tokenizer: Any) -> Any:
    """A parameter of the sampler, ready for the device: a number or a padded array."""
    is_scalar = param.shape == () and param.encode is None
    if is_scalar:
        value = _scalar(param, value)
    if clause := _clause(param, value):
        raise _Bad(clause)
    if param.encode is not None:
        try:
            value = param.encode(value, tokenizer)
        except (TypeError, ValueError) as error:
            raise _Bad(f"is not usable ({error})") from error
    return value if is_scalar else _padded(param, value)


def _scalar(param: Param, value: Any) -> int | float:
    is_float = param.dtype == "float32"
    if not _is_number(value, Real if is_float else Integral):
        clause = None
        with suppress(Exception):  # a check may be written for numbers only
            clause = param.check(value)
        raise _Bad(clause or ("must be a number" if is_float else "must be an integer"))
    value = _plain(value)
    if (_MAX_FLOAT32 if is_float else _MAX_INT32) < abs(value) < float("inf"):
        raise _Bad(f"must fit into {param.dtype}")
    return float(value) if is_float else int(value)


def _clause(param: Param, value: Any) -> str | None:
    try:
        return param.check(value)
    except (TypeError, ValueError) as error:
        return f"is not usable ({error})"


def _padded(param: Param, value: Any) -> np.ndarray:
    array = np.full(param.shape, param.pad, param.dtype)
    part = np.asarray(value)
    if part.ndim != array.ndim or any(map(int.__gt__, part.shape, array.shape)):
        raise _Bad(f"must have a shape of at most {param.shape}, has {part.shape}")
    array[tuple(map(slice, part.shape))] = part
    return array
