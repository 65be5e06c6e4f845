"""Real jobs on a tiny model, killed at random and run again: equal to one that was left alone."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerFast

from jaxengine.serve import batch
from tests.serve.batch_files import read_results, write_lines

PARAMS = {"temperature": 1.0, "max_new_tokens": 2, "seed": 11}
WORDS = "love death night crown sword king heart tongue blood grace heaven tears".split()
NUM_KILLS = 5
JOIN_S = 60
"""Longest wait for a process that has nothing left to do."""


class Job(NamedTuple):
    """An input, its engine, and what a run that nobody disturbed made of it."""

    source: Path
    engine: dict[str, Any]
    num_rows: int
    expected: list[dict[str, Any]]


@pytest.fixture(scope="module")
def processes() -> Any:
    """Makes processes that have imported everything, and can be killed."""
    context = multiprocessing.get_context("forkserver")
    heavy = [PreTrainedTokenizerFast.__module__, "pyarrow.parquet"]
    context.set_forkserver_preload([*heavy, "jaxengine.engine", "jaxengine.serve.batch.job"])
    return context


def make_job(folder: Path, engine: dict[str, Any], num_rows: int) -> Job:
    rng = random.Random(num_rows)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(num_rows)]
    rows = [{"prompt": f"{text}:\n", "place": i} for i, text in enumerate(texts)]
    source, whole = write_lines(folder / "in.jsonl", rows), folder / "whole.jsonl"
    batch.run(source, whole, sampling_params=PARAMS, **engine)
    return Job(source, engine, num_rows, read_results(whole))


@pytest.fixture(scope="module")
def on_disk(checkpoint: Path, settings: dict[str, Any], engine: Any) -> dict[str, Any]:
    """Arguments of an engine that a process starts in a second."""
    del engine  # it has filled the executable cache
    return {"model_path": str(checkpoint), "engine_settings": settings}


@pytest.fixture(scope="module")
def job_of_300(tmp_path_factory: pytest.TempPathFactory, on_disk: dict[str, Any]) -> Job:
    return make_job(tmp_path_factory.mktemp("job"), on_disk, 300)


def num_written(target: Path, num_rows: int) -> int:
    """Results that a later run would find; where frames are compressed, by their bytes."""
    if target.suffix == ".parquet":
        manifest = target / "_manifest.json"
        parts = json.loads(manifest.read_text())["parts"] if manifest.exists() else []
        return sum(part["num_rows"] for part in parts)
    data = target.read_bytes() if target.exists() else b""
    return data.count(b"\n") if target.suffix == ".jsonl" else min(len(data) // 100, num_rows - 1)


def run_until(processes: Any, job: Job, target: Path, row: int | None) -> int | None:
    """Runs the job in a process of its own, and kills it when so many results are there."""
    process = processes.Process(
        target=batch.run,
        args=(job.source, target),
        kwargs={
            "sampling_params": PARAMS,
            "rows_per_part": max(1, job.num_rows // 50),
            "sync_s": 0.05,
            **job.engine,
        },
    )
    process.start()
    try:
        while row is not None and process.is_alive():
            if num_written(target, job.num_rows) >= row:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        process.join(JOIN_S)
    finally:
        process.kill()
    return process.exitcode


def check(processes: Any, job: Job, target: Path) -> None:
    """Kills the job five times on its way, at rows drawn at random, and lets it end."""
    rows = sorted(
        random.Random(f"{target.name}").sample(range(1, job.num_rows * 9 // 10), NUM_KILLS)
    )
    for row in rows:
        assert run_until(processes, job, target, row) == -signal.SIGKILL
        assert row <= num_written(target, job.num_rows) < job.num_rows
    assert run_until(processes, job, target, None) == 0
    assert read_results(target) == job.expected
    assert len(job.expected) == job.num_rows


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_job_killed_five_times_ends_as_if_it_had_not_been(
    processes: Any, job_of_300: Job, tmp_path: Path, suffix: str
):
    check(processes, job_of_300, tmp_path / f"out.{suffix}")


@pytest.mark.nightly
@pytest.mark.timeout(450)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_a_large_job_killed_five_times_ends_as_if_it_had_not_been(
    processes: Any, on_disk: dict[str, Any], tmp_path: Path, suffix: str
):
    check(processes, make_job(tmp_path, on_disk, 10_000), tmp_path / f"out.{suffix}")
