"""The header of a GGUF file: metadata, and where the tensors are.

The `gguf` package reads it, too, but makes an array of every string: that takes it ten seconds for
a vocabulary of 150,000 tokens.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxengine.errors import ConfigError

SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"} | {
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""Number of a value type -> numpy's name of it."""

STRING, ARRAY = 8, 9


class TensorInfo(NamedTuple):
    """Where a tensor is.

    Attributes:
      name: In the file.
      shape: In numpy's order.
      kind: Number of its type.
      start: Its first byte, counted from that of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata by key, and tensors by name.

    Raises:
      ConfigError: If this is no GGUF file of version 2 or 3, or it is cut off.
    """
    with path.open("rb") as file:
        try:
            magic, version, num_tensors, num_keys = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ConfigError(f"{path} is not a GGUF file of version 2 or 3.")
            metadata = {}
            for _ in range(num_keys):
                key = _string(file)
                metadata[key] = _value(file, _number(file, "<u4"))
            infos = [_tensor(file) for _ in range(num_tensors)]
        except (struct.error, ValueError, KeyError) as error:
            raise ConfigError(f"The header of {path} cannot be read: {error!r}.") from error
        alignment = metadata.get("general.alignment", 32)
        data = -(-file.tell() // alignment) * alignment
    return metadata, {info.name: info._replace(start=data + info.start) for info in infos}


def _number(file: BinaryIO, kind: str) -> Any:
    [value] = np.frombuffer(file.read(np.dtype(kind).itemsize), kind)
    # The shortest decimal of a 32-bit float is what the converter read.
    return float(str(value)) if kind == "<f4" else value.item()


def _string(file: BinaryIO) -> str:
    [length] = struct.unpack("<Q", file.read(8))
    return file.read(length).decode("utf-8", "replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        return _number(file, SCALARS[kind])
    item, length = struct.unpack("<IQ", file.read(12))
    if item in SCALARS:
        dtype = np.dtype(SCALARS[item])
        return np.frombuffer(file.read(length * dtype.itemsize), dtype).tolist()
    return [_value(file, item) for _ in range(length)]


def _tensor(file: BinaryIO) -> TensorInfo:
    name = _string(file)
    sizes = [_number(file, "<u8") for _ in range(_number(file, "<u4"))]
    kind, start = struct.unpack("<IQ", file.read(12))
    return TensorInfo(name, tuple(reversed(sizes)), kind, start)
