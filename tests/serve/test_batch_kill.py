"""Real jobs on the demo model, killed at random and run again: equal to one that was left alone."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import jaxengine
from jaxengine.serve import batch
from tests.serve.batch_files import read_results, write_lines

PARAMS = {"temperature": 1.0, "max_new_tokens": 2, "seed": 11}
WORDS = "love death night crown sword king heart tongue blood grace heaven tears".split()


@pytest.fixture(scope="module")
def processes() -> Any:
    """Makes processes that have imported everything, and can be killed."""
    context = multiprocessing.get_context("forkserver")
    heavy = [PreTrainedTokenizerFast.__module__, "orbax.checkpoint", "pyarrow.parquet"]
    context.set_forkserver_preload([*heavy, "jaxengine.engine", "jaxengine.serve.batch.job"])
    return context


def make_rows(num: int) -> list[dict[str, Any]]:
    rng = random.Random(num)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(num)]
    return [{"prompt": f"{text}:\n", "place": i} for i, text in enumerate(texts)]


def num_written(target: Path) -> int:
    if target.suffix == ".parquet":
        return len(list(target.glob("part-*.parquet"))) if target.exists() else 0
    data = target.read_bytes() if target.exists() else b""
    return data.count(b"\n") if target.suffix == ".jsonl" else len(data) // 100


def run_and_kill(processes: Any, source: Path, target: Path, num_more: int | None, **job: Any):
    """Runs the job in a process of its own, and kills it when so many more results are there."""
    before = num_written(target)
    process = processes.Process(target=batch.run, args=(source, target), kwargs=job)
    process.start()
    try:
        while process.is_alive():
            if num_more is not None and num_written(target) >= before + num_more:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        process.join(60)
    finally:
        process.kill()
    return process.exitcode


def check(
    processes: Any, engine: Any, settings: Any, folder: Path, suffix: str, num_rows: int, kills: int
):
    source = write_lines(folder / "in.jsonl", make_rows(num_rows))
    whole = folder / "whole.jsonl"
    batch.run(source, whole, engine=engine, sampling_params=PARAMS)
    target = folder / f"out.{suffix}"
    job = {
        "sampling_params": PARAMS,
        "rows_per_part": num_rows // 30,
        "sync_s": 0.05,
        "model_path": jaxengine.DEMO_MODEL,
        "engine_settings": settings,
    }
    rng = random.Random(7)
    most = num_rows // 8 if suffix == "jsonl" else 3
    for _ in range(kills):
        code = run_and_kill(processes, source, target, rng.randint(1, most), **job)
        assert code == -signal.SIGKILL
    assert run_and_kill(processes, source, target, None, **job) == 0
    results = read_results(target)
    assert len(results) == num_rows
    assert results == read_results(whole)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_job_killed_at_random_ends_as_if_it_had_not_been(
    processes: Any, demo: Any, demo_settings: Any, tmp_path: Path, suffix: str
):
    # Starting an engine takes seconds; there are five kills in the nightly run.
    check(processes, demo, demo_settings, tmp_path, suffix, num_rows=300, kills=1)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_rows", [300, 10_000])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet"])
def test_a_job_killed_five_times_ends_as_if_it_had_not_been(
    processes: Any, demo: Any, demo_settings: Any, tmp_path: Path, suffix: str, num_rows: int
):
    check(processes, demo, demo_settings, tmp_path, suffix, num_rows=num_rows, kills=5)
