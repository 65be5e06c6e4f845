"""Chooses the implementation of an op: the caller's, or the best one for the current backend."""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Implementation = Literal["reference", "triton", "jax_triton", "mosaic", "triton_interpret"]

_log = logging.getLogger("pallas_kernels")


def call(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    on_gpu: str = "triton",
    **kwargs: Any,
) -> Any:
    """Calls one of `implementations`.

    None takes `on_gpu` on a GPU and "reference" elsewhere; where the former refuses the shape or
    the GPU, the reference serves it and the reason is logged once. An explicit choice never falls
    back.

    Raises:
      NotImplementedError: The chosen implementation cannot serve these arguments.
      ValueError: There is no implementation of that name.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"`implementation` of {op} must be one of {sorted(implementations)} or None. "
                f"Got {implementation!r}."
            )
        return implementations[implementation](*args, **kwargs)
    if jax.default_backend() == "gpu":
        try:
            out = implementations[on_gpu](*args, **kwargs)
        except NotImplementedError as error:
            _log_once(logging.WARNING, f"{op}: reference, not {on_gpu}: {error}")
        else:
            _log_once(logging.INFO, f"{op}: {on_gpu}")
            return out
    else:
        _log_once(logging.INFO, f"{op}: reference")
    return implementations["reference"](*args, **kwargs)


@functools.cache
def _log_once(level: int, message: str) -> None:
    _log.log(level, message)
