"""Calls of a user's functions while they are traced: what is wrong with one names it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from jaxengine.errors import SamplerError


def name_of(function: Callable[..., Any]) -> str:
    """What a function or its maker is called: `dry` for the `apply` that `dry()` closes over."""
    while isinstance(function, functools.partial):
        function = function.args[0] if function.args else function.func
    return getattr(function, "__qualname__", type(function).__name__).partition(".<locals>")[0]


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a user's function.

    Raises:
      SamplerError: Whatever it raises, with its name.
    """
    try:
        return function(*args)
    except SamplerError:
        raise
    except Exception as error:
        raise SamplerError(
            f"The sampler's `{name_of(function)}` raised {type(error).__name__}: {error}"
        ) from error


def like(wanted: Array, function: Callable[..., Any], *args: Any) -> Array:
    """Calls a user's function, whose result must have this shape and dtype."""
    result = run(function, *args)
    if kind_of(result) != kind_of(wanted):
        raise SamplerError(
            f"The sampler's `{name_of(function)}` must return {kind_of(wanted)}, "
            f"but returned {kind_of(result)}."
        )
    return result


def per_row_arrays(num_rows: int, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a user's function, whose result must be a pytree of arrays [B, ...]."""
    result = run(function, *args)
    for leaf in jax.tree.leaves(result):
        if getattr(leaf, "shape", ())[:1] != (num_rows,):
            raise SamplerError(
                f"The sampler's `{name_of(function)}` must return arrays with a leading axis of "
                f"{num_rows} rows, but returned {kind_of(leaf)}."
            )
    return result


def kind_of(value: Any) -> str:
    """Dtype and shape, as messages show them."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__
