"""The run-time type checker of the tests, which jaxtyping's import hook puts on every function."""

from collections.abc import Callable

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

_INT_IS_A_FLOAT = BeartypeConf(is_pep484_tower=True)


def check_types(function: Callable) -> Callable:
    """beartype, but for the functions whose types it cannot check at run time."""
    try:
        return beartype(conf=_INT_IS_A_FLOAT)(function)
    except BeartypeDecorHintPep3119Exception:  # a Protocol that is not @runtime_checkable
        return function
