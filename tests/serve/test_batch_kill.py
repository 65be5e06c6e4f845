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
import zstandard
from transformers import PreTrainedTokenizerFast

from jaxengine.serve import batch
from tests.serve.batch_files import read_results, write_lines

PARAMS = {"temperature": 1.0, "max_new_tokens": 2, "seed": 11}
WORDS = "love death night crown sword king heart tongue blood grace heaven tears".split()
NUM_KILLS = 5
JOIN_S = 120
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


def make_job(processes: Any, folder: Path, engine: dict[str, Any], num_rows: int) -> Job:
    rng = random.Random(num_rows)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(num_rows)]
    rows = [{"prompt": f"{text}:\n", "place": i} for i, text in enumerate(texts)]
    job = Job(write_lines(folder / "in.jsonl", rows), engine, num_rows, [])
    assert run_until(processes, job, folder / "whole.jsonl", None) == 0
    return job._replace(expected=read_results(folder / "whole.jsonl"))


@pytest.fixture(scope="module")
def on_disk(checkpoint: Path, settings: dict[str, Any], engine: Any) -> dict[str, Any]:
    """Arguments of an engine that a process starts in a second."""
    del engine  # it has filled the executable cache
    return {"model_path": str(checkpoint), "engine_settings": settings}


def num_written(target: Path) -> int:
    """Results that a later run would find, give or take those of a torn frame."""
    if target.suffix == ".parquet":
        manifest = target / "_manifest.json"
        parts = json.loads(manifest.read_text())["parts"] if manifest.exists() else []
        return sum(part["num_rows"] for part in parts)
    data = target.read_bytes() if target.exists() else b""
    if target.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    return data.count(b"\n")


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
            if num_written(target) >= row:
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
        assert row <= num_written(target) < job.num_rows
    assert run_until(processes, job, target, None) == 0
    assert read_results(target) == job.expected
    assert len(job.expected) == job.num_rows


@pytest.fixture(scope="module")
def job_of_300(processes: Any, tmp_path_factory: pytest.TempPathFactory, on_disk: Any) -> Job:
    return make_job(processes, tmp_path_factory.mktemp("job"), on_disk, 300)


@pytest.fixture(scope="module")
def job_of_10_000(processes: Any, tmp_path_factory: pytest.TempPathFactory, on_disk: Any) -> Job:
    return make_job(processes, tmp_path_factory.mktemp("job"), on_disk, 10_000)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_job_killed_five_times_ends_as_if_it_had_not_been(
    processes: Any, job_of_300: Job, tmp_path: Path, suffix: str
):
    check(processes, job_of_300, tmp_path / f"out.{suffix}")


@pytest.mark.nightly
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_a_large_job_killed_five_times_ends_as_if_it_had_not_been(
    processes: Any, job_of_10_000: Job, tmp_path: Path, suffix: str
):
    check(processes, job_of_10_000, tmp_path / f"out.{suffix}")
