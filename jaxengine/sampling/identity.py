"""When two samplers are the same program: equal code and equal closed-over values.

A notebook builds its chains anew in every cell, so identity of objects says too little; and a
helper edited in another cell changes what unchanged code does, so code alone says too much.
"""

import dataclasses
import functools
import hashlib
import os
import sys
import sysconfig
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

type Key = tuple[Any, ...]

type _Seen = dict[int, tuple[Key, Any]]

_PLAIN = bool | int | float | complex | str | bytes | None | types.EllipsisType | range
_MAX_HASHED_BYTES = 1 << 20


def structure_of(value: Any, arguments: Sequence[Any] = ()) -> Key:
    """A hashable key of what a value does: equal keys compile to the same program.

    Functions count by their code, defaults, closed-over values and, outside installed packages,
    by the globals they name; containers by their items; small numpy arrays by their content;
    instances of classes outside installed packages by their methods and attributes; all else by
    identity. A key holds what it identifies, so no identity is reused while it lives.

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


def digest_of(value: Any) -> str:
    """What `structure_of` tells apart, as 16 hexadecimal digits that outlive the process.

    Arrays count by their content. What has an identity alone counts by its name, or its type's: an
    edit of such an object is not seen. Another version of Python compiles other code.
    """
    return hashlib.sha256(_lasting(structure_of(value)).encode()).hexdigest()[:16]


def _lasting(key: Any) -> str:
    if isinstance(key, tuple):
        return f"({','.join(map(_lasting, key))})"
    if isinstance(key, frozenset):
        return f"{{{','.join(sorted(map(_lasting, key)))}}}"
    value = key.value if isinstance(key, _Same) else key
    if not isinstance(value, _PLAIN) and hasattr(value, "__array__"):
        array = np.asarray(value)
        return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"
    if isinstance(value, _PLAIN | np.dtype):
        return repr(value)
    named = value if hasattr(value, "__qualname__") else type(value)
    name = value.__name__ if isinstance(value, types.ModuleType) else named.__qualname__
    return f"{named.__module__}.{name}"


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
    if isinstance(value, set | frozenset):
        return (type(value), frozenset(_key(item, seen) for item in value))
    if isinstance(value, slice):
        return (slice, _key((value.start, value.stop, value.step), seen))
    if isinstance(value, Mapping):
        return (type(value), *((_key(k, seen), _key(v, seen)) for k, v in value.items()))
    if isinstance(value, np.ndarray | np.generic) and value.nbytes <= _MAX_HASHED_BYTES:
        # The bytes of an array of objects are addresses.
        content = _key(value.tolist(), seen) if value.dtype.hasobject else value.tobytes()
        return (type(value), value.dtype.str, value.shape, content)
    if isinstance(value, types.FunctionType):
        return _function_key(_unchecked(value), seen)
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
    if not isinstance(value, type) and not _is_installed(type(value).__module__):
        return (
            "instance",
            _class_key(type(value), seen),
            _key(getattr(value, "__dict__", {}), seen),
        )
    return ("object", _Same(value))


def _class_key(cls: type, seen: _Seen) -> Key:
    methods = [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    return (_Same(cls), *(_key(method, seen) for method in methods))


def _function_key(function: types.FunctionType, seen: _Seen) -> Key:
    closed_over = tuple(_cell(cell) for cell in function.__closure__ or ())
    named: dict[str, Any] = {}
    # NOTE: not `__module__`, which functools.wraps copies from what is wrapped.
    if not _is_installed(str(function.__globals__.get("__name__"))):
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


def _unchecked(function: types.FunctionType) -> types.FunctionType:
    """The function without the type checks around it, which are new objects every time."""
    while function.__globals__.get("__name__", "").partition(".")[0] in ("jaxtyping", "beartype"):
        inner = getattr(function, "__wrapped__", None)
        if not isinstance(inner, types.FunctionType):
            break
        function = inner
    return function


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _code_key(code: types.CodeType) -> Key:
    constants = tuple(
        _code_key(c)
        if isinstance(c, types.CodeType)
        # A set's order is another one in every process.
        else (type(c), repr(sorted(c, key=repr) if isinstance(c, frozenset) else c))
        for c in code.co_consts
    )
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return (code.co_code, constants, names, code.co_argcount, code.co_flags)


def _names(code: types.CodeType) -> set[str]:
    """Global names a code and those nested in it use."""
    nested = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in nested))


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether what a module defines stays as it is while the process lives.

    A checkout does not, even one that was installed in place: it may be edited and reloaded.
    """
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module == "__main__":  # built in, or a notebook
        return module.partition(".")[0] in sys.stdlib_module_names
    return any(file.startswith(path + os.sep) for path in _INSTALLED)


_INSTALLED = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
