"""What the functions of a sampler must return, and errors that name the one that did not."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxengine.errors import SamplerError


def name_of(function: Callable[..., Any]) -> str:
    """What a function or its maker is called: `dry` for the `apply` that `dry()` closes over."""
    while isinstance(function, functools.partial):  # its last argument, where that is a function
        inner = function.args[-1] if function.args else None
        function = inner if callable(inner) else function.func
    return getattr(function, "__qualname__", type(function).__name__).partition(".<locals>")[0]


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of a sampler; what it raises carries a note of its name."""
    try:
        return function(*args)
    except Exception as error:
        note = f"raised by `{name_of(function)}`, a part of the sampler"
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def require_like(function: Callable[..., Any], got: Any, wanted: Any, what: str) -> None:
    """Checks the structure, shapes and dtypes of what a function returned.

    Raises:
      SamplerError: If they are not those of `wanted`.
    """
    if kind_of(got) != kind_of(wanted):
        raise SamplerError(
            f"`{name_of(function)}` must return {what} as {kind_of(wanted)}, but returned "
            f"{kind_of(got)}."
        )


def require_rows(function: Callable[..., Any], got: Any, rows: tuple[int, ...], what: str) -> None:
    """Checks that all arrays a function returned have the leading axes of the step: its rows.

    Raises:
      SamplerError: If one has not.
    """
    for leaf in jax.tree.leaves(got):
        if getattr(leaf, "shape", ())[: len(rows)] != rows:
            raise SamplerError(
                f"`{name_of(function)}` must return {what} with a leading axis of "
                f"{'x'.join(map(str, rows))} rows, but returned {kind_of(got)}."
            )


def kind_of(value: Any) -> str:
    """Structure, dtypes and shapes, as text: "(float32[4,50], int32[4])"."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    children = jax.tree.leaves(value, is_leaf=lambda x: x is not value)
    if not children or children == [value]:
        return type(value).__name__ if jax.tree.leaves(value) or value is None else "()"
    return f"({', '.join(map(kind_of, children))})"
