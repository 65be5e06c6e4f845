"""The command line: what it says, what it returns, what it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jaxengine
from jaxengine.serve import batch, gpus
from jaxengine.serve.batch.rows import DEFAULT_MAX_NEW_TOKENS
from jaxengine.serve.cli import main
from tests.serve.batch_files import read_results, write_lines
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_batch import ROWS


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", ROWS)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings of the engines that were made; they are fakes."""
    made: list[dict[str, Any]] = []

    def make(**settings: Any) -> FakeEngine:
        made.append(settings)
        return FakeEngine()

    monkeypatch.setattr(jaxengine, "Engine", make)
    return made


def test_run_writes_results_and_reports(
    source: Path, engines: list[Any], capsys: pytest.CaptureFixture[str]
):
    target = source.with_name("out.jsonl")
    command = ["run", str(source), str(target), "--seed", "5", "--max-new-tokens", "4", "--json"]
    command += ["--stop", "x", "--param", "top_k=3", "--set", "context_length=64"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().err)
    assert (report["num_done"], report["num_errors"]) == (7, 0)
    assert [row["id"] for row in read_results(target)] == [row["custom_id"] for row in ROWS]
    assert engines == [{"model_path": jaxengine.DEMO_MODEL, "sampler": None, "context_length": 64}]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().err)["num_skipped"] == 7
    job = json.loads(source.with_name("out.jsonl.job.json").read_text())
    expected = {"seed": 5, "max_new_tokens": 4, "stop": ["x"], "top_k": 3}
    assert job["sampling_params"] == expected


def test_help_is_what_a_newcomer_needs(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    told = capsys.readouterr().err
    assert all(f"jaxengine {command}" in told for command in ("demo", "run", "serve"))
    with pytest.raises(SystemExit, match="0"):
        main(["run", "--help"])
    told = capsys.readouterr().out
    assert f"(default: {DEFAULT_MAX_NEW_TOKENS})" in " ".join(told.split())
    lines = [line for line in told.splitlines() if line.strip().startswith("--")]
    assert not [line for line in lines if len(line.split()) < 3 and len(line) < 24]


def test_exit_codes_tell_errors_apart(
    source: Path, engines: list[Any], capsys: pytest.CaptureFixture[str]
):
    bad = write_lines(source.with_name("bad.jsonl"), [*ROWS, {"prompt": ""}])
    target = str(source.with_name("out.jsonl"))
    assert main(["run", str(bad), target]) == 3
    assert "8 rows, 1 error row (" in capsys.readouterr().err
    assert main(["run", str(bad), target, "--temperature", "0.5"]) == 1
    assert "`sampling_params` was {}" in capsys.readouterr().err
    assert main(["run", str(bad), target, "--overwrite", "--max-errors", "0"]) == 1
    assert "`max_errors` is 0" in capsys.readouterr().err
    for arguments in (["--set", "top"], ["--param", "top"], ["--set", "contxt_length=3"]):
        assert main(["run", str(source), target, *arguments]) == 1
    assert "did you mean `context_length`?" in capsys.readouterr().err
    assert main(["run", str(source), target, "--param", "temprature=3"]) == 1
    assert "did you mean `temperature`?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["run"])
    assert usage.value.code == 2


def test_a_dry_run_counts_and_checks_without_an_engine(
    source: Path, engines: list[Any], capsys: pytest.CaptureFixture[str]
):
    rows = [*ROWS, {"prompt": "a " * 5000}, {"prompt": "a", "sampling_params": {"top_p": 7}}]
    write_lines(source, rows)
    assert main(["run", str(source), "-", "--dry-run", "--json"]) == 3
    *errors, report = capsys.readouterr().err.splitlines()
    report = json.loads(report)
    assert (report["num_rows"], report["num_errors"]) == (9, 2)
    assert report["prompt_tokens"] > report["max_prompt_tokens"] > 0
    assert [error.split("has")[0] for error in errors[:1]] == ["The prompt of line 8 "]
    assert [error.split(":")[0] for error in errors[1:]] == ["Line 9"]
    assert engines == []


def test_help_names_every_command_and_shows_examples(capsys: pytest.CaptureFixture[str]):
    for command, words in (
        ([], ["demo", "convert", "run", "serve"]),
        (["run"], ["examples:", "exit codes:", "--retry-errors", "--shard i/n"]),
        (["serve"], ["examples:", "--api-key-file", "127.0.0.1"]),
    ):
        with pytest.raises(SystemExit) as done:
            main([*command, "--help"])
        assert done.value.code == 0
        told = capsys.readouterr().out
        assert all(word in told for word in words)


def test_each_gpu_gets_a_process_and_a_shard(monkeypatch: pytest.MonkeyPatch):
    started, codes = [], [0, 3]

    class Process:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            self._number = len(started)
            started.append((command, env["CUDA_VISIBLE_DEVICES"]))

        def wait(self) -> int:
            return codes[self._number]

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert main(["run", "in.jsonl", "out.jsonl", "--gpus", "2", "--seed", "1"]) == 3
    head = [sys.executable, "-m", "jaxengine.serve.cli", "run", "in.jsonl", "out.jsonl"]
    assert started == [
        ([*head, "--seed", "1", "--shard", "0/2"], "4"),
        ([*head, "--seed", "1", "--shard", "1/2", "--no-progress"], "6"),
    ]
    started.clear()
    codes[0] = -9
    assert main(["run", "in.jsonl", "out.jsonl", "--gpus=2"]) == 1


@pytest.mark.nightly
def test_two_processes_do_what_one_does(
    engine: Any, checkpoint: Path, settings: dict[str, Any], source: Path
):
    """On a CPU both have the same device, which is all the same to them."""
    params = {"seed": 3, "temperature": 1.0, "max_new_tokens": 4}
    batch.run(source, source.with_name("one.jsonl"), engine=engine, sampling_params=params)
    command = ["run", str(source), str(source.with_name("out.jsonl")), "--gpus", "2"]
    command += [f"--param={name}={value}" for name, value in params.items()]
    command += [f"--set={name}={json.dumps(value)}" for name, value in settings.items()]
    assert main([*command, "--model", str(checkpoint)]) == 0
    shards = [read_results(source.with_name(f"out-0000{i}-of-00002.jsonl")) for i in range(2)]
    assert all(shards)
    found = {row["id"]: row for rows in shards for row in rows}
    assert found == {row["id"]: row for row in read_results(source.with_name("one.jsonl"))}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["in", "out", "--gpus", "0"], "must be at least 1"),
        (["in", "out", "--gpus", "3"], "at most the 2 GPUs"),
        (["in", "out", "--gpus", "2", "--shard", "0/2"], "makes the shards itself"),
        (["-", "out", "--gpus", "2"], "needs files"),
    ],
)
def test_gpus_that_make_no_sense_are_refused(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert main(["run", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_gpus_leaves_the_command_line_in_both_forms():
    assert gpus.without_gpus(["run", "--gpus", "2", "a"]) == ["run", "a"]
    assert gpus.without_gpus(["run", "--gpus=2", "a"]) == ["run", "a"]


def test_an_open_address_needs_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--host", "0.0.0.0"]) == 1
    assert "pass `--api-key-file`" in capsys.readouterr().err
    empty = tmp_path / "key"
    empty.touch()
    assert main(["serve", "--api-key-file", str(empty)]) == 1
    assert "is empty" in capsys.readouterr().err
    assert main(["serve", "--api-key-file", os.devnull + "/none"]) == 1
    assert "cannot be read" in capsys.readouterr().err
