"""Results as JSON lines, plain or compressed, that survive being cut off anywhere.

A file is a sequence of frames: a line, a gzip member or a Zstandard frame. Whole frames are kept,
and a torn one at the end is cut off before anything is appended.
"""

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxengine.errors import ConfigError
from jaxengine.serve.batch.read import need_zstandard

FRAME_BYTES = 1 << 20
"""A compressed frame is closed at this size, if not by time before."""

READ_BYTES = 1 << 20


class Codec(NamedTuple):
    """How frames are made and told apart.

    Attributes:
      encode: Lines to a frame.
      decoder: Makes an object with `decompress`, `eof` and `unused_data` for one frame; None where
        every line is a frame.
      is_buffered: Frames are worth waiting for more lines.
    """

    encode: Callable[[bytes], bytes]
    decoder: Callable[[], Any] | None
    is_buffered: bool


def codec_of(path: Path) -> Codec:
    """The codec by the ending of a name."""
    if path.suffix == ".gz":

        def gzip(data: bytes) -> bytes:
            packer = zlib.compressobj(wbits=31)
            return packer.compress(data) + packer.flush()

        return Codec(gzip, lambda: zlib.decompressobj(31), True)
    if path.suffix == ".zst":
        zstandard = need_zstandard()
        unpacker = zstandard.ZstdDecompressor()
        return Codec(zstandard.ZstdCompressor().compress, unpacker.decompressobj, True)
    return Codec(lambda data: data, None, False)


class LineFile:
    """An output of JSON lines. Owned by the job's thread."""

    def __init__(self, path: Path, sync_s: float) -> None:
        """Args:
        path: Is made if it is not there.
        sync_s: Longest time a result stays off the disk.
        """
        self._path = path
        self._codec = codec_of(path)
        self._sync_s = sync_s
        self._synced = time.monotonic()
        self._buffer = bytearray()
        self._file = self._open()

    def results(self) -> Iterator[dict[str, Any]]:
        """The results of earlier runs; what is torn at the end is cut off the file.

        Raises:
          ConfigError: For a line in the middle that is not JSON: nobody but a job wrote here.
        """
        end = line = 0
        with self._path.open("rb") as file:
            for data, offset in _frames(file, self._codec):
                for raw in data.splitlines():
                    line += 1
                    yield self._parse(raw, line)
                end = offset
        self._file.truncate(end)
        self._file.seek(end)

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the file with only some of its results; all or nothing."""
        scratch = self._path.with_name(f"{self._path.name}.tmp")
        with scratch.open("wb", buffering=0) as file:
            for batch in _batches(result for result in self.results() if is_kept(result)):
                _write_all(file, self._codec.encode(batch))
            os.fsync(file.fileno())
        os.replace(scratch, self._path)
        sync_folder(self._path.parent)
        self._file.close()
        self._file = self._open()

    def append(self, result: dict[str, Any]) -> None:
        """Adds a result."""
        self._buffer += dump(result)
        if not self._codec.is_buffered or len(self._buffer) >= FRAME_BYTES:
            self._flush()
        if time.monotonic() - self._synced >= self._sync_s:
            self.sync()

    def sync(self) -> None:
        """Puts what was added on the disk."""
        self._flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Syncs, and closes the file."""
        try:
            self.sync()
        finally:
            self._file.close()

    def _open(self) -> IO[bytes]:
        # Not "ab": there, a file cannot be written where it was cut.
        self._path.touch()
        file = self._path.open("r+b", buffering=0)
        file.seek(0, os.SEEK_END)
        return file

    def _flush(self) -> None:
        if self._buffer:
            data, self._buffer = bytes(self._buffer), bytearray()
            _write_all(self._file, self._codec.encode(data))

    def _parse(self, raw: bytes, line: int) -> dict[str, Any]:
        try:
            result = json.loads(raw)
        except ValueError:
            result = None
        if not isinstance(result, dict) or "error" not in result or "id" not in result:
            raise ConfigError(
                f"Line {line} of {self._path} is not a result, so another program wrote there. "
                "Take the line out, name another output, or pass `overwrite`."
            )
        return result


class StandardOutput:
    """Results to the standard output: nothing to resume from."""

    def append(self, result: dict[str, Any]) -> None:
        """Writes a result."""
        sys.stdout.buffer.write(dump(result))
        sys.stdout.buffer.flush()

    def close(self) -> None:
        """Nothing is left to do."""


def dump(result: dict[str, Any]) -> bytes:
    """A result as a line."""
    try:
        return json.dumps(result, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in a column, which has no UTF-8
        return json.dumps(result, default=str).encode() + b"\n"


def sync_folder(folder: Path) -> None:
    """Makes a rename in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _batches(results: Iterable[dict[str, Any]]) -> Iterator[bytes]:
    buffer = bytearray()
    for result in results:
        buffer += dump(result)
        if len(buffer) >= FRAME_BYTES:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


def _frames(file: IO[bytes], codec: Codec) -> Iterator[tuple[bytes, int]]:
    """Whole frames, decoded, and where each ends."""
    if codec.decoder is None:
        end = 0
        for line in file:
            if line.endswith(b"\n"):
                end += len(line)
                yield line, end
        return
    end, rest = 0, b""
    while rest := rest or file.read(READ_BYTES):
        decoder, data, size = codec.decoder(), bytearray(), 0
        while rest and not decoder.eof:
            try:
                data += decoder.decompress(rest)
            except Exception:  # each codec has an error of its own; the frame is torn
                return
            size += len(rest) - len(decoder.unused_data)
            rest = decoder.unused_data if decoder.eof else file.read(READ_BYTES)
        if not decoder.eof:
            return
        end += size
        yield bytes(data), end


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
