"""What the host reads of a step: one int32 array, and a second only when someone asked for it.

In each the leaves of a token lie side by side: a step of a window writes two arrays, not one for
each leaf.
"""

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

ON_DEMAND = ("id_logprobs", "top_ids", "top_logprobs")
"""Leaves large enough to be copied only when a row of the step asked for them."""

TOKEN = "token"

type Specs = Mapping[str, jax.ShapeDtypeStruct]


class Results(NamedTuple):
    """What the host may read of some rows and steps, as int32: [B, n], or [B, steps, n].

    Attributes:
      always: Tokens, their logprobs, captures.
      on_demand: Leaves that are copied only when a row asked for them.
    """

    always: Int[Array, "*B n"]
    on_demand: Int[Array, "*B m"]


class ResultLayout:
    """Names, shapes and dtypes of what is reported of a token, and how they are packed."""

    def __init__(self, leaves: Mapping[str, Any]) -> None:
        """Takes the leaves of a `Sample`, as shapes [B, ...]."""
        specs = {
            TOKEN: jax.ShapeDtypeStruct((), jnp.int32),
            **{
                name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
                for name, leaf in flatten(leaves).items()
            },
        }
        self.always = {n: spec for n, spec in specs.items() if n not in ON_DEMAND}
        self.on_demand = {n: spec for n, spec in specs.items() if n in ON_DEMAND}

    def having(self, specs: Specs) -> "ResultLayout":
        """This one with more leaves that are copied on demand; shapes without the rows."""
        more = copy.copy(self)
        more.on_demand = {**self.on_demand, **specs}
        return more

    def describe(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """What compiled programs depend on."""
        specs = {**self.always, **self.on_demand}
        return tuple((name, spec.shape, str(spec.dtype)) for name, spec in specs.items())


def flatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays, or shapes alone, by path: "aux" of a draw may be a nest of them."""
    paths, _ = jax.tree_util.tree_flatten_with_path(dict(leaves))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def pack(leaves: Mapping[str, Array], layout: ResultLayout) -> Results:
    """Leaves [B, ...] side by side, as int32."""
    return Results(_side_by_side(leaves, layout.always), _side_by_side(leaves, layout.on_demand))


def empty(layout: ResultLayout, num_rows: int, num_steps: int) -> Results:
    """Room for a window in which no row has drawn."""
    specs = {**layout.always, **layout.on_demand}
    nothing = {n: jnp.full((1, *s.shape), -(n == TOKEN), s.dtype) for n, s in specs.items()}
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_rows, num_steps, x.shape[-1])), pack(nothing, layout)
    )


def put(window: Results, step: Int[Array, ""], values: Results) -> Results:
    """Sets one step of a window."""
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice(x, new[:, None], (0, step, 0)), window, values
    )


def unpack(packed: np.ndarray, specs: Specs) -> dict[str, np.ndarray]:
    """The leaves again, [rows, steps, ...]; floats as float32.

    Args:
      packed: [rows, steps, n].
      specs: Of the leaves, in their order.
    """
    leaves, start = {}, 0
    for name, spec in specs.items():
        size = math.prod(spec.shape)
        part = packed[..., start : start + size]
        start += size
        is_float = _is_float(spec.dtype)
        part = part.view(np.float32) if is_float else part.astype(spec.dtype, copy=False)
        leaves[name] = part.reshape(*packed.shape[:2], *spec.shape)
    return leaves


@functools.cache
def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _side_by_side(leaves: Mapping[str, Array], specs: Specs) -> Int[Array, "B n"]:
    num_rows = leaves[TOKEN].shape[0]
    parts = [jnp.zeros((num_rows, 0), jnp.int32)]
    for name in specs:
        leaf = leaves[name]
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32)
        parts.append(leaf.astype(jnp.int32).reshape(num_rows, -1))
    return jnp.concatenate(parts, axis=-1)
