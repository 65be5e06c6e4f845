"""Results as a folder of Parquet parts. The manifest says which parts count; the rest is debris."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxengine.errors import ConfigError
from jaxengine.serve.batch.columns import OWN_COLUMNS
from jaxengine.serve.batch.lines import sync_folder
from jaxengine.serve.batch.read import need_pyarrow

MANIFEST = "_manifest.json"
NESTED = "input"
"""Column with the other columns of a JSON input; nothing else is called so."""


def schema_of(columns: Any) -> Any:
    """The schema of the parts.

    Args:
      columns: Schema of the columns passed through, under their new names; None for a JSON input,
        whose columns stand in `input` as JSON text.
    """
    pa = need_pyarrow()
    tokens = pa.list_(pa.int32())
    usage = ("prompt_tokens", "completion_tokens", "truncated_tokens")
    error = [("type", pa.string()), ("message", pa.string()), ("line", pa.int64())]
    types = {
        "id": pa.string(),
        "text": pa.string(),
        "texts": pa.list_(pa.string()),
        # A list for one sample, too, so that the type is one.
        "output_ids": pa.list_(tokens),
        "finish_reason": pa.string(),
        "finish_reasons": pa.list_(pa.string()),
        "seed": pa.int64(),
        "seeds": pa.list_(pa.int64()),
        "usage": pa.struct([(name, pa.int64()) for name in usage]),
        "error": pa.struct(error),
    }
    own = [pa.field(name, types[name]) for name in OWN_COLUMNS]
    rest = [pa.field(NESTED, pa.string())] if columns is None else list(columns)
    return pa.schema([*own, *rest])


def table_of(results: list[dict[str, Any]], schema: Any) -> Any:
    """Results as an Arrow table with a schema of `schema_of`."""
    is_nested = schema.names[-1] == NESTED
    return need_pyarrow().Table.from_pylist([_flat(r, is_nested) for r in results], schema)


def _flat(result: dict[str, Any], is_nested: bool) -> dict[str, Any]:
    own = {name: result.get(name) for name in OWN_COLUMNS}
    if own["output_ids"] is not None and own["texts"] is None:
        own["output_ids"] = [own["output_ids"]]
    rest = {name: value for name, value in result.items() if name not in own}
    return {**own, NESTED: json.dumps(rest, ensure_ascii=False)} if is_nested else {**own, **rest}


class PartFolder:
    """An output of Parquet parts. Owned by the job's thread."""

    def __init__(self, folder: Path, columns: Any, rows_per_part: int, sync_s: float) -> None:
        """Args:
        folder: Is there.
        columns: See `schema_of`.
        rows_per_part: Most rows of a part.
        sync_s: Longest time a result waits for its part to be full, in seconds.
        """
        self._folder = folder
        self._schema = schema_of(columns)
        self._rows_per_part = rows_per_part
        self._sync_s = sync_s
        self._since = time.monotonic()
        self._rows: list[dict[str, Any]] = []
        manifest = folder / MANIFEST
        self._parts = json.loads(manifest.read_text())["parts"] if manifest.exists() else []

    def results(self) -> Iterator[dict[str, Any]]:
        """`id` and `error` of earlier results; parts that the manifest does not know are dropped.

        Raises:
          ConfigError: For a part that is gone or broken.
        """
        known = {part["file"] for part in self._parts}
        for path in self._folder.glob("*part-*"):
            if path.name not in known:
                path.unlink()
        for part in self._parts:
            for batch in self._open(part).iter_batches(columns=["id", "error"]):
                yield from batch.to_pylist()

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the parts with only some of their results; all or nothing."""
        pa = need_pyarrow()
        kept = []
        for part in self._parts:
            table = self._open(part).read()
            mask = [is_kept(result) for result in table.select(["id", "error"]).to_pylist()]
            if not all(mask):
                table = table.filter(pa.array(mask))
                part = self._write(table, part["file"].replace("part-", "part-k", 1))
            if table.num_rows:
                kept.append(part)
        old, self._parts = self._parts, kept
        self._write_manifest()
        for part in old:
            if part not in kept:
                (self._folder / part["file"]).unlink()

    def append(self, result: dict[str, Any]) -> None:
        """Adds a result."""
        self._rows.append(result)
        is_late = time.monotonic() - self._since >= self._sync_s
        if is_late or len(self._rows) >= self._rows_per_part:
            self.sync()

    def sync(self) -> None:
        """Puts what was added on the disk, as a part."""
        self._since = time.monotonic()
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        table = table_of(rows, self._schema)
        number = 1 + max((_number(part["file"]) for part in self._parts), default=-1)
        self._parts.append(self._write(table, f"part-{number:05}.parquet"))
        self._write_manifest()

    def close(self) -> None:
        """Writes the last part, and a manifest where there was nothing to write."""
        self.sync()
        self._write_manifest()

    def _open(self, part: dict[str, Any]) -> Any:
        pa = need_pyarrow()
        try:
            return pa.parquet.ParquetFile(self._folder / part["file"])
        except (OSError, pa.ArrowInvalid) as error:
            raise ConfigError(
                f"Part {part['file']} of {self._folder} is gone or broken: {error}. Put it back, "
                f"or take it out of {MANIFEST} to have its rows computed again."
            ) from error

    def _write(self, table: Any, name: str) -> dict[str, Any]:
        scratch = self._folder / f".{name}.tmp"
        with scratch.open("wb") as file:
            need_pyarrow().parquet.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self._folder / name)
        num_errors = len(table) - table["error"].null_count
        return {"file": name, "num_rows": len(table), "num_errors": num_errors}

    def _write_manifest(self) -> None:
        scratch = self._folder / f".{MANIFEST}.tmp"
        with scratch.open("w") as file:
            json.dump({"parts": self._parts}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self._folder / MANIFEST)
        sync_folder(self._folder)


def _number(name: str) -> int:
    return int(name.removesuffix(".parquet").rsplit("-", 1)[1].lstrip("k"))
