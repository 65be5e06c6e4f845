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
    headline = f"The weights in {checkpoint.place} do not fit its config."
    _check_shapes(checkpoint.shapes(), parts, headline)
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


def _check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, WeightPart],
    headline: str,
    *,
    is_partial: bool = False,
) -> None:
    missing = [] if is_partial else sorted(parts.keys() - shapes.keys())
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
        raise WeightsError(f"{headline} {'; '.join(problems)}.")


def random_params(target: Params, seed: int = 0) -> Params:
    """Random weights of the right shapes and small scale; norms are about one.

    Made of one block of noise, read from another place for every leaf, so that gigabytes of them
    take no longer than copying does.
    """
    rng = np.random.default_rng(seed)
    noise = 0.02 * rng.standard_normal(NOISE_LEN, np.float32)
    largest: dict[tuple[jnp.dtype, int], int] = {}
    for shape in jax.tree.leaves(target):
        kind = (shape.dtype, _mean(shape))
        largest[kind] = max(shape.size, largest.get(kind, 0))
    # Rounding to bfloat16 is slow on a host, and so is touching new memory: both are done once.
    # Every leaf is a part of the block, repeated as often as the largest needs.
    blocks = {
        kind: np.resize((kind[1] + noise).astype(kind[0]), NOISE_LEN + size)
        for kind, size in largest.items()
    }

    def leaf(shape: jax.ShapeDtypeStruct) -> jax.Array:
        start = rng.integers(NOISE_LEN)
        host = blocks[shape.dtype, _mean(shape)][start : start + shape.size]
        return jax.device_put(host.reshape(shape.shape), shape.sharding)

    return jax.tree.map(leaf, target)


def _mean(shape: jax.ShapeDtypeStruct) -> int:
    """About one are norms, and biases with them."""
    return int(len(shape.shape) == 1)


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
    problems += [
        f"{name[key]} is {leaf.dtype}, expected a float"
        for key, leaf in got.items()
        if not jnp.issubdtype(getattr(leaf, "dtype", np.asarray(leaf).dtype), jnp.floating)
    ]
    if problems:
        raise WeightsError("`params` do not fit the model config: " + "; ".join(sorted(problems)))
    placed = {
        key: jax.device_put(jnp.asarray(got[key], leaf.dtype), leaf.sharding)
        for key, leaf in want.items()
    }
    return traverse_util.unflatten_dict(placed)


def merge_named(
    tensors: Mapping[str, Any],
    parts: Mapping[str, WeightPart],
    current: Params | None,
    target: Params,
    *,
    is_partial: bool,
) -> Params:
    """New parameters of tensors under their checkpoint names; what they leave out stays as it is.

    Args:
      tensors: numpy or jax arrays, or whatever speaks DLPack.
      parts: Where each goes.
      current: The parameters so far; only read. None where all are given.
      target: Abstract parameters with shardings.
      is_partial: Names may be missing.

    Raises:
      WeightsError: Names every missing, unexpected and misshapen tensor at once.
    """
    arrays = {name: _as_array(tensor) for name, tensor in tensors.items()}
    headline = "The tensors do not fit the model."
    shapes = {name: array.shape for name, array in arrays.items()}
    _check_shapes(shapes, parts, headline, is_partial=is_partial)
    integers = [n for n, x in arrays.items() if not jnp.issubdtype(x.dtype, jnp.floating)]
    if integers:
        raise WeightsError(f"{headline} {len(integers)} are no floats: {', '.join(integers[:20])}.")
    merged: dict[tuple[Any, ...], Any] = {} if current is None else _flatten(current)
    for key, leaf in _flatten(target).items():
        path = ".".join(map(str, key))
        names = [name for name in arrays.keys() & parts.keys() if parts[name].path == path]
        names.sort(key=lambda name: parts[name].start)
        pieces = [(parts[name].start, arrays[name].astype(leaf.dtype)) for name in names]
        if sum(len(piece) for _, piece in pieces) == leaf.shape[0]:
            new = _joined([piece for _, piece in pieces])
        else:
            new = merged[key]
            for start, piece in pieces:
                new = new.at[start : start + len(piece)].set(piece)
        merged[key] = jax.device_put(new, leaf.sharding)
    return traverse_util.unflatten_dict(merged)


def _joined(pieces: list[Any]) -> Any:
    """On the host if they are there: joining on the device would compile for every shape."""
    if len(pieces) == 1:
        return pieces[0]
    is_host = all(isinstance(piece, np.ndarray) for piece in pieces)
    return (np if is_host else jnp).concatenate(pieces)


def named(name: str, parts: Mapping[str, WeightPart], params: Params) -> jax.Array | None:
    """The rows of a parameter that a checkpoint calls by this name; None for an unknown one."""
    if name not in parts:
        return None
    path, start, shape = parts[name]
    flat = {".".join(map(str, key)): leaf for key, leaf in _flatten(params).items()}
    return flat[path][start : start + shape[0]]


def _as_array(tensor: Any) -> Any:
    if isinstance(tensor, np.ndarray | jax.Array):
        return tensor
    return jnp.from_dlpack(tensor) if hasattr(tensor, "__dlpack__") else np.asarray(tensor)


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
