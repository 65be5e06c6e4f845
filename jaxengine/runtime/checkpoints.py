"""Checkpoint files as tensors under their Hugging Face names, one at a time."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from tqdm.auto import tqdm

from jaxengine.errors import WeightsError
from jaxengine.gguf_file import GGUFFile, is_gguf


class Checkpoint(Protocol):
    """What weights are loaded from.

    Attributes:
      place: What messages call it.
    """

    place: str

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        ...

    def read(self, names: Collection[str], dtype: Any, *, progress: bool) -> Iterator[Any]:
        """Pairs of a name and its tensor; of `dtype` or one that is cast to it."""
        ...


def open_checkpoint(path: Path, names: Collection[str]) -> Checkpoint:
    """The safetensors of a folder, or a GGUF file.

    Args:
      path: The folder, or a file that ends in `.gguf`.
      names: Hugging Face names of the tensors that will be looked for.

    Raises:
      WeightsError: If there are no weights, or none that are read.
    """
    return GGUFCheckpoint(GGUFFile(path), names) if is_gguf(path) else SafetensorsFolder(path)


class SafetensorsFolder:
    """`model.safetensors`, or shards with `model.safetensors.index.json`."""

    def __init__(self, folder: Path) -> None:
        """Finds the files.

        Raises:
          WeightsError: If some are missing; with the remedy where the folder holds others.
        """
        self.place = str(folder)
        self._shards = _shards(folder)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in self._shards:
            with safe_open(shard, framework="numpy") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        return shapes

    def read(self, names: Collection[str], dtype: Any, *, progress: bool) -> Iterator[Any]:
        """Pairs of a name and its tensor in the file's own dtype, shard by shard."""
        label = "Loading safetensors checkpoint shards"
        for shard in tqdm(self._shards, desc=label, disable=not progress):
            with safe_open(shard, framework="numpy") as file:
                for name in file.keys():
                    if name in names:
                        yield name, file.get_tensor(name)


class GGUFCheckpoint:
    """A GGUF file, dequantised while it is read."""

    def __init__(self, file: GGUFFile, names: Collection[str]) -> None:
        self.place = str(file.path)
        self._file, self._own_names = file, file.names(names)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: self._file.shape(own) for name, own in self._own_names.items()}

    def read(self, names: Collection[str], dtype: Any, *, progress: bool) -> Iterator[Any]:
        """Pairs of a name and its tensor in `dtype`."""
        label = "Loading GGUF checkpoint tensors"
        for name, own in tqdm(self._own_names.items(), desc=label, disable=not progress):
            if name in names:
                yield name, self._file.read(own, dtype)


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [folder / name for name in names]
    else:
        shards = sorted(folder.glob("*.safetensors"))
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise WeightsError(
            f"No safetensors weights in {folder}: its index names {', '.join(missing)}. "
            "Download the whole checkpoint, or pass load_format='dummy' for random weights."
        )
    if not shards:
        raise WeightsError(f"No safetensors weights in {folder}{_remedy(folder)}")
    return shards


def _remedy(folder: Path) -> str:
    """The rest of the sentence, after what else the folder holds."""
    for pattern in ("*.bin", "*.pt", "*.pth"):
        if found := sorted(folder.glob(pattern)):
            return (
                f", but {found[0].name}, which is pickled code and is never opened. Take a "
                "checkpoint with safetensors, or convert it where torch and transformers are: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
            )
    return ". Download the whole checkpoint, or pass load_format='dummy' for random weights."
