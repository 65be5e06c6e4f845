"""Memory of a batch job does not grow with its input."""

import json
import multiprocessing
import resource
from pathlib import Path

import pytest

from jaxengine.serve import batch
from tests.serve.fake_engine import FakeEngine

NUM_ROWS = 1_000_000
ALLOWED_KIB = 64 << 10


def peak_kib(source: Path, target: Path, limit: int, result: multiprocessing.SimpleQueue) -> None:
    engine = FakeEngine()
    batch.run(source, target, engine=engine, limit=limit, sampling_params={"seed": 1})
    result.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_a_million_rows_take_the_memory_of_a_few(tmp_path: Path, suffix: str):
    source = tmp_path / "in.jsonl"
    with source.open("w") as file:
        for i in range(NUM_ROWS):
            # Ids, for tokenizing takes half of the time and keeps nothing.
            file.write(json.dumps({"input_ids": [i % 50 + 1, 2, 3], "place": i}) + "\n")
    context = multiprocessing.get_context("spawn")
    peaks = []
    for limit in (30_000, NUM_ROWS):
        queue = context.SimpleQueue()
        target = tmp_path / f"out-{limit}.{suffix}"
        process = context.Process(target=peak_kib, args=(source, target, limit, queue))
        process.start()
        peaks.append(queue.get())
        process.join()
    assert peaks[1] - peaks[0] < ALLOWED_KIB
