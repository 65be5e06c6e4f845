"""Checkpoints to device arrays: tensor by tensor, Orbax, random; never a second host copy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxengine.errors import WeightsError
from jaxengine.models import WeightPart
from jaxengine.models.family import BoundModel, Params
from jaxengine.runtime.checkpoints import Checkpoint
from jaxengine.runtime.sharding import param_sharding

ORBAX_FOLDER = "orbax"
"""Sub-folder of a converted checkpoint that holds its arrays."""


def place(model: BoundModel, mesh: Mesh) -> Params:
    """Abstract parameters with their shardings."""
    leaves, structure = jax.tree.flatten(model.abstract)
    axes = structure.flatten_up_to(model.axes)
    return structure.unflatten(
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param_sharding(mesh, leaf_axes))
        for leaf, leaf_axes in zip(leaves, axes, strict=True)
    )


def load_checkpoint(
    checkpoint: Checkpoint, parts: Mapping[str, WeightPart], target: Params, *, progress: bool
) -> Params:
    """Streams a checkpoint to the device, one merged parameter at a time.

    Args:
      checkpoint: Tensors under their Hugging Face names.
      parts: Where each of them goes.
      target: Abstract parameters with shardings.
      progress: Show a bar.

    Raises:
      WeightsError: Names every missing, unexpected and misshapen tensor at once.
    """
    _check(checkpoint, parts)
    wanted = {".".join(map(str, k)): v for k, v in _flatten(target).items()}
    [dtype] = {leaf.dtype for leaf in wanted.values()}
    loaded: dict[str, jax.Array] = {}
    waiting: dict[str, list[tuple[int, np.ndarray]]] = {}
    for name, tensor in checkpoint.read(parts.keys(), dtype, progress=progress):
        path, start, _ = parts[name]
        pieces = waiting.setdefault(path, [])
        pieces.append((start, tensor))
        leaf = wanted[path]
        if sum(len(piece) for _, piece in pieces) == leaf.shape[0]:
            merged = [piece for _, piece in sorted(waiting.pop(path), key=lambda p: p[0])]
            host = merged[0] if len(merged) == 1 else np.concatenate(merged)
            loaded[path] = jax.device_put(host.astype(leaf.dtype, copy=False), leaf.sharding)
    flat = {key: loaded[".".join(map(str, key))] for key in _flatten(target)}
    return traverse_util.unflatten_dict(flat)


def _check(checkpoint: Checkpoint, parts: Mapping[str, WeightPart]) -> None:
    shapes = checkpoint.shapes()
    missing = sorted(parts.keys() - shapes.keys())
    # A tied checkpoint may still carry its output projection, and old ones rotary buffers.
    unexpected = sorted(
        name
        for name in shapes.keys() - parts.keys()
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    )
    misshapen = [
        f"{name} is {shapes[name]}, expected {part.shape}"
        for name, part in sorted(parts.items())
        if name in shapes and shapes[name] != part.shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    ]
    if problems:
        raise WeightsError(
            f"The weights in {checkpoint.place} do not fit its config. " + "; ".join(problems) + "."
        )


def random_params(target: Params, seed: int = 0) -> Params:
    """Random weights of the right shapes and small scale; norms are about one.

    Made of one block of noise, read from another place for every leaf, so that gigabytes of them
    take no longer than copying does.
    """
    rng = np.random.default_rng(seed)
    noise = 0.02 * rng.standard_normal(NOISE_LEN, np.float32)

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        is_norm = len(shape.shape) == 1
        block = np.roll(1.0 + noise if is_norm else noise, rng.integers(NOISE_LEN))
        host = np.resize(block.astype(shape.dtype), shape.shape)
        return jax.device_put(host, shape.sharding)

    return jax.tree.map(leaf, target)


NOISE_LEN = 4_194_301
"""A prime, so that no two rows of a repeated block are alike."""


def check_params(params: Params, target: Params) -> Params:
    """Puts arrays of the user's own tree on the mesh; no copy where they already fit.

    Raises:
      WeightsError: Names every missing, unexpected and misshapen leaf at once.
    """
    got, want = _flatten(params), _flatten(target)
    name = {key: ".".join(map(str, key)) for key in got.keys() | want.keys()}
    problems = [f"missing {name[key]}" for key in want.keys() - got.keys()]
    problems += [f"unexpected {name[key]}" for key in got.keys() - want.keys()]
    problems += [
        f"{name[key]} is {np.shape(got[key])}, expected {want[key].shape}"
        for key in want.keys() & got.keys()
        if np.shape(got[key]) != want[key].shape
    ]
    if problems:
        raise WeightsError("`params` do not fit the model config: " + "; ".join(sorted(problems)))
    placed = {
        key: jax.device_put(jnp.asarray(got[key], leaf.dtype), leaf.sharding)
        for key, leaf in want.items()
    }
    return traverse_util.unflatten_dict(placed)


def save_orbax(params: Params, folder: Path) -> None:
    """Writes the parameters as an Orbax checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / ORBAX_FOLDER, _string_keys(params))


def load_orbax(folder: Path, target: Params) -> Params:
    """Restores parameters straight to their shardings."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder.resolve() / ORBAX_FOLDER, _string_keys(target))
    flat = _flatten(restored)
    keys = {tuple(map(str, key)): key for key in _flatten(target)}
    return traverse_util.unflatten_dict({keys[key]: leaf for key, leaf in flat.items()})


def _flatten(tree: Params) -> dict[tuple[Any, ...], Any]:
    return cast("dict[tuple[Any, ...], Any]", traverse_util.flatten_dict(tree))


def _string_keys(tree: Params) -> Params:
    flat = _flatten(tree)
    return traverse_util.unflatten_dict({tuple(map(str, k)): v for k, v in flat.items()})
