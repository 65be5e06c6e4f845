"""When two samplers are the same program: equal code and equal closed-over values.

A notebook builds its chains anew in every cell, so identity of objects says too little; and a
helper edited in another cell changes what unchanged code does, so code alone says too much.
"""

import dataclasses
import functools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

type Key = tuple[Any, ...]

type _Seen = dict[int, tuple[Key, Any]]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, frozenset)
_MAX_HASHED_BYTES = 1 << 20


def structure_of(value: Any, arguments: Sequence[Any] = ()) -> Key:
    """A hashable key of what a value does: equal keys compile to the same program.

    Functions count by their code, defaults, closed-over values and, outside installed packages,
    by the globals they name; containers by their items; small numpy arrays by their content; all
    else by identity. A key holds what it identifies, so no identity is reused while it lives.

    Args:
      value: Mostly a sampler.
      arguments: Arrays inside it that count by shape and dtype only: what is compiled takes them
        as arguments.
    """
    seen: _Seen = {}
    for i, array in enumerate(arguments):
        seen[id(array)] = (("argument", i, tuple(array.shape), str(array.dtype)), array)
    return _key(value, seen)


def are_equal(a: Any, b: Any) -> bool:
    """Whether two values do the same."""
    return a is b or structure_of(a) == structure_of(b)


class _Same:
    """An object that equals only itself, hashable whatever it is, and kept alive by its keys."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _key(value: Any, seen: _Seen) -> Key:
    # 0.0 == -0.0 and 1 == True, but they do not do the same.
    if isinstance(value, _PLAIN):
        return (type(value), repr(value))
    if id(value) in seen:  # shared, or a cycle: a function that names itself, say
        return ("seen", seen[id(value)][0])
    seen[id(value)] = ((len(seen),), value)  # held, so that its id stays its own
    if isinstance(value, tuple | list):
        return (type(value), *(_key(item, seen) for item in value))
    if isinstance(value, Mapping):
        return (type(value), *((_key(k, seen), _key(v, seen)) for k, v in value.items()))
    if isinstance(value, np.ndarray | np.generic) and value.nbytes <= _MAX_HASHED_BYTES:
        return (type(value), value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, types.FunctionType):
        return _function_key(value, seen)
    if isinstance(value, types.MethodType):
        return ("method", _key(value.__func__, seen), _key(value.__self__, seen))
    if isinstance(value, functools.partial):
        return ("partial", *(_key(x, seen) for x in (value.func, value.args, value.keywords)))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return (type(value), _key(fields, seen))
    wrapped = getattr(value, "__wrapped__", None)  # jax.jit and its kin
    if isinstance(wrapped, types.FunctionType):
        return (type(value), _key(wrapped, seen))
    return ("object", _Same(value))


def _function_key(function: types.FunctionType, seen: _Seen) -> Key:
    closed_over = tuple(_cell(cell) for cell in function.__closure__ or ())
    named: dict[str, Any] = {}
    if not _is_installed(function):
        names = _names(function.__code__)
        named = {n: function.__globals__[n] for n in sorted(names & function.__globals__.keys())}
    return (
        "function",
        _code_key(function.__code__),
        *(
            _key(part, seen)
            for part in (closed_over, function.__defaults__, function.__kwdefaults__, named)
        ),
    )


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _code_key(code: types.CodeType) -> Key:
    constants = tuple(
        _code_key(c) if isinstance(c, types.CodeType) else (type(c), repr(c))
        for c in code.co_consts
    )
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return (code.co_code, constants, names, code.co_argcount, code.co_flags)


def _names(code: types.CodeType) -> set[str]:
    """Global names a code and those nested in it use."""
    nested = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in nested))


def _is_installed(function: types.FunctionType) -> bool:
    """Functions of packages do not change while the process lives."""
    # NOTE: not `__module__`, which functools.wraps copies from what is wrapped.
    package = function.__globals__.get("__name__", "__main__").partition(".")[0]
    module = sys.modules.get(package)
    return package != "__main__" and hasattr(module, "__path__")
