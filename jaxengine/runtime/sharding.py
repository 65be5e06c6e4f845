"""Logical axes to mesh axes. A mesh of one device is always there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

RULES: dict[str, str | None] = {
    "vocab": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
    "embed": None,
    "head_dim": None,
}
"""Which mesh axis a logical axis of a parameter is split over (Megatron's layout)."""


def make_mesh(devices: Sequence[Any]) -> Mesh:
    """A mesh with the single axis "tensor"."""
    return Mesh(np.asarray(devices), ("tensor",))


def param_sharding(mesh: Mesh, axes: Sequence[str]) -> NamedSharding:
    """Sharding of a parameter with these logical axes."""
    return NamedSharding(mesh, Spec(*(RULES[axis] for axis in axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, Spec())


def kv_sharding(mesh: Mesh) -> NamedSharding:
    """Pages [pages, 2, K, page_size, H] are split over the kv heads."""
    return NamedSharding(mesh, Spec(None, None, "tensor"))
