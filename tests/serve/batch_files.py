"""Writing inputs and reading outputs of batch jobs, by other means than the job's own."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import zstandard

SUFFIXES = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(data))
    else:
        path.write_bytes(data)
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    """Results in the order of the file; nulls of Parquet's fixed columns are left out."""
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        rows = [{k: v for k, v in row.items() if v is not None} for row in table.to_pylist()]
        return [json.loads(row.pop("input", "{}")) | row for row in rows]
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    rows = [json.loads(line) for line in data.splitlines()]
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    results = read_results(path)
    found = {row["id"]: row for row in results}
    assert len(found) == len(results), "a row is there twice"
    return found
