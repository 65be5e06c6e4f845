"""What the host reads of a step: one int32 array, and a second only when someone asked for it."""

import copy
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

ON_DEMAND = ("id_logprobs", "top_ids", "top_logprobs")
"""Leaves large enough to be copied only when a row of the step asked for them."""

TOKEN = "token"

type Specs = Mapping[str, jax.ShapeDtypeStruct]


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

    def empty(self, num_rows: int, num_steps: int) -> dict[str, Array]:
        """Room for a window."""
        specs = {**self.always, **self.on_demand}
        return {
            name: jnp.full((num_rows, num_steps, *spec.shape), -(name == TOKEN), spec.dtype)
            for name, spec in specs.items()
        }


def flatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays, or shapes alone, by path: "aux" of a draw may be a nest of them."""
    paths, _ = jax.tree_util.tree_flatten_with_path(dict(leaves))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def pack(values: Mapping[str, Array], specs: Specs) -> Int[Array, " n"]:
    """Leaves [B, steps, ...] as one int32 array: one copy."""
    parts = []
    for name in specs:
        value = values[name]
        if jnp.issubdtype(value.dtype, jnp.floating):
            value = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
        parts.append(value.astype(jnp.int32).reshape(-1))
    return jnp.concatenate(parts)


def unpack(packed: np.ndarray, specs: Specs, num_steps: int) -> dict[str, np.ndarray]:
    """The leaves again, [rows, steps, ...]; floats as float32."""
    sizes = [num_steps * int(np.prod(spec.shape)) for spec in specs.values()]
    num_rows = len(packed) // sum(sizes)
    leaves, start = {}, 0
    for (name, spec), size in zip(specs.items(), sizes, strict=True):
        part = packed[start : start + num_rows * size].reshape(num_rows, num_steps, *spec.shape)
        start += num_rows * size
        if jnp.issubdtype(spec.dtype, jnp.floating):
            leaves[name] = part.view(np.float32)
        else:
            leaves[name] = part.astype(spec.dtype)
    return leaves
