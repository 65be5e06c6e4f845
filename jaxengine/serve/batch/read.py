"""Records of an input, one after another, whatever its format. Knows nothing of prompts."""

import contextlib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxengine.errors import ConfigError

BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
ROWS_PER_READ = 1024


class Record(NamedTuple):
    """One record of the input.

    Attributes:
      line: From 1; for Parquet the number of the row.
      value: What stands there: a dict, or a text of a plain text input.
      raw: The line itself, where it could not be read.
      error: Why it could not be read.
    """

    line: int
    value: Any = None
    raw: bytes = b""
    error: str | None = None


def format_of(source: str, chosen: str | None = None) -> str:
    """The format of an input by its name: "jsonl", "parquet" or "text"."""
    if chosen is not None:
        return chosen
    name = source.removesuffix(".gz").removesuffix(".zst")
    suffix = "" if source == "-" else Path(name).suffix
    return {".parquet": "parquet", ".txt": "text"}.get(suffix, "jsonl")


def read(source: str, format: str) -> Iterator[Record]:
    """Reads an input lazily; a bad record is one with an `error`, not the end.

    Raises:
      ConfigError: If the input cannot be opened, or breaks off in its compression.
    """
    if format == "parquet":
        yield from _parquet(source)
        return
    with contextlib.closing(open_bytes(source)) as file:
        lines = _numbered(file, source)
        yield from map(_text if format == "text" else _json, _without_blank_end(lines))


def count(source: str, format: str) -> int | None:
    """About how many records there are, for a progress bar; None where only reading would tell."""
    if source == "-" or source.endswith((".gz", ".zst")):
        return None
    if format == "parquet":
        return sum(file.metadata.num_rows for file in parquet_files(source))
    with open_bytes(source) as file:
        blocks = iter(lambda: file.read(1 << 20), b"")
        return sum(block.count(b"\n") for block in blocks)


def open_bytes(source: str) -> io.BufferedIOBase:
    """Opens an input for reading, decompressed by the ending of its name.

    Raises:
      ConfigError: If there is none.
    """
    if source == "-":
        return io.BufferedReader(io.FileIO(sys.stdin.fileno(), closefd=False))
    try:
        if source.endswith(".gz"):
            return gzip.open(source)
        if source.endswith(".zst"):
            unpacker = need_zstandard().ZstdDecompressor()
            packed = open(source, "rb")
            return io.BufferedReader(unpacker.stream_reader(packed, read_across_frames=True))
        return open(source, "rb")
    except OSError as error:
        raise ConfigError(f"The input {source!r} cannot be read: {error.strerror}.") from error


def parquet_files(source: str) -> list[Any]:
    """The Parquet files behind a name, a folder's in their order; its index files stay out.

    Raises:
      ConfigError: If there are none.
    """
    parquet = need_pyarrow().parquet
    path = Path(source)
    names = sorted(path.glob("[!._]*.parquet")) if path.is_dir() else [path]
    try:
        files = [parquet.ParquetFile(name) for name in names]
    except (OSError, need_pyarrow().ArrowInvalid) as error:
        raise ConfigError(f"The input {source!r} cannot be read: {error}.") from error
    if not files:
        raise ConfigError(f"The folder {source!r} holds no Parquet files.")
    return files


def need_pyarrow() -> Any:
    """The pyarrow package.

    Raises:
      ConfigError: Says how to install it.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow; pip install 'jaxengine[batch]'.") from error
    return pyarrow


def need_zstandard() -> Any:
    """The zstandard package.

    Raises:
      ConfigError: Says how to install it.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(".zst needs zstandard; pip install 'jaxengine[batch]'.") from error
    return zstandard


def _numbered(file: io.BufferedIOBase, source: str) -> Iterator[tuple[int, bytes]]:
    broken: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
    if source.endswith(".zst"):
        broken += (need_zstandard().ZstdError,)
    line = 0
    try:
        for line, raw in enumerate(file, start=1):
            yield line, raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
    except broken as error:
        raise ConfigError(
            f"The input {source!r} breaks off after line {line}: {error}. What was read is done; "
            "mend the file and run the job again."
        ) from error


def _without_blank_end(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Drops blank lines at the end of the input, as editors leave them."""
    num_blank = 0
    for line, raw in lines:
        if not raw.strip():
            num_blank += 1
            continue
        yield from ((blank, b"") for blank in range(line - num_blank, line))
        num_blank = 0
        yield line, raw


def _json(numbered: tuple[int, bytes]) -> Record:
    line, raw = numbered
    if not raw.strip():
        return Record(line, raw=raw, error=f"Line {line} is blank.")
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        what = BOMS.get(raw[:2], "not UTF-8")
        return Record(
            line, raw=raw, error=f"Line {line} is {what} (byte {error.start}); use UTF-8."
        )
    except (json.JSONDecodeError, RecursionError) as error:
        return Record(line, raw=raw, error=f"Line {line} is not JSON: {error}.")
    if not isinstance(value, dict):
        got = type(value).__name__
        return Record(line, raw=raw, error=f"Line {line} must be a JSON object, got {got}.")
    return Record(line, value)


def _text(numbered: tuple[int, bytes]) -> Record:
    line, raw = numbered
    if not raw.strip():
        return Record(line, raw=raw, error=f"Line {line} is blank.")
    try:
        return Record(line, raw.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        where = f"(byte {error.start})"
        return Record(line, raw=raw, error=f"Line {line} is not UTF-8 {where}; convert it.")


def _parquet(source: str) -> Iterator[Record]:
    line = 0
    for file in parquet_files(source):
        with file:
            for batch in file.iter_batches(ROWS_PER_READ):
                for value in batch.to_pylist():
                    line += 1
                    yield Record(line, value)
