"""A batch job that is cut off anywhere, and run again: none lost, none twice, nothing changed."""

import errno
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.errors import ConfigError
from jaxengine.sampling import LogitsTransform, chain, default_sampler, temperature
from jaxengine.serve import batch
from jaxengine.serve.batch import lines
from jaxengine.serve.batch.sidecar import locked, model_identity
from tests.serve.batch_files import SUFFIXES, read_results, write_lines
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_batch import PARAMS, ROWS, run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", ROWS)


@pytest.fixture(autouse=True)
def usual_interrupts() -> Iterator[None]:
    """A process in the background may have been started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Killed(BaseException):
    """Stands for the end of the process: nothing after it is written."""


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_an_output_cut_anywhere_is_completed(
    tmp_path: Path, source: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lines, "FRAME_BYTES", 300)
    target = tmp_path / f"out.{suffix}"
    run(source, target)
    whole, expected = target.read_bytes(), read_results(target)
    for size in range(0, len(whole), 17):
        target.write_bytes(whole[:size])
        report = run(source, target)
        assert read_results(target) == expected
        assert report.num_skipped + report.num_done == len(ROWS)
        assert (report.num_done > 0) == (size < len(whole))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_loses_nothing(
    tmp_path: Path, source: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
):
    target, expected = tmp_path / f"out.{suffix}", tmp_path / f"expected.{suffix}"
    run(source, expected, rows_per_part=2)

    def half(file: Any, data: bytes) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def until(place: int) -> None:
        if place == 5:
            monkeypatch.setattr(lines, "_write_all", half)
            monkeypatch.setattr(
                "pyarrow.parquet.write_table", lambda _, file: half(file, b"PAR1 and so on")
            )

    with pytest.raises(OSError, match="No space left"):
        run(source, target, engine=FakeEngine(until), rows_per_part=2)
    monkeypatch.undo()
    report = run(source, target, rows_per_part=2)
    assert report.num_done + report.num_skipped == len(ROWS)
    assert read_results(target) == read_results(expected)


def test_parts_that_the_manifest_does_not_know_are_debris(tmp_path: Path, source: Path):
    target = tmp_path / "out.parquet"
    run(source, target, rows_per_part=2)
    expected = read_results(target)
    manifest = json.loads((target / "_manifest.json").read_text())
    manifest["parts"] = manifest["parts"][:2]
    (target / "_manifest.json").write_text(json.dumps(manifest))
    (target / ".part-00009.parquet.tmp").write_bytes(b"half")
    report = run(source, target, rows_per_part=2)
    assert (report.num_skipped, report.num_done) == (4, 3)
    assert read_results(target) == expected
    assert not list(target.glob(".*tmp"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("is_ordered", [True, False])
def test_the_first_interrupt_ends_gently_and_the_job_goes_on(
    tmp_path: Path, source: Path, suffix: str, is_ordered: bool
):
    target, before = tmp_path / f"out.{suffix}", signal.getsignal(signal.SIGINT)

    def interrupt(place: int) -> None:
        if place == 3:
            signal.raise_signal(signal.SIGINT)

    report = run(source, target, engine=FakeEngine(interrupt), is_ordered=is_ordered)
    assert report.is_interrupted
    assert (report.num_done, len(read_results(target))) == (4, 4)
    assert signal.getsignal(signal.SIGINT) is before
    report = run(source, target, is_ordered=is_ordered)
    assert (report.num_skipped, report.num_done) == (4, 3)
    run(source, tmp_path / f"whole.{suffix}")
    assert read_results(target) == read_results(tmp_path / f"whole.{suffix}")


def test_the_second_interrupt_is_as_usual(tmp_path: Path, source: Path):
    def interrupt(place: int) -> None:
        if place == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "out.jsonl", engine=FakeEngine(interrupt))
    assert len(read_results(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_error_rows_are_tried_again_where_that_is_wanted(tmp_path: Path, suffix: str):
    rows = [*ROWS, {"custom_id": "bad", "prompt": ""}, {"custom_id": "end", "prompt": "z"}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    target = tmp_path / f"out.{suffix}"
    assert run(source, target, rows_per_part=2).num_errors == 1
    again = run(source, target, rows_per_part=2)
    assert (again.num_done, again.num_errors, again.num_errors_before) == (0, 0, 1)
    rows[7]["prompt"] = "mended"
    write_lines(source, rows)
    retried = run(source, target, rows_per_part=2, retry_errors=True)
    assert (retried.num_done, retried.num_errors, retried.num_errors_before) == (1, 0, 0)
    results = {row["id"]: row for row in read_results(target)}
    assert len(results) == len(read_results(target)) == len(rows)
    assert results["bad"]["text"].startswith("mended|")
    assert run(source, target, rows_per_part=2, retry_errors=True).num_done == 0


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_output_has_one_writer(tmp_path: Path, source: Path, suffix: str):
    target = tmp_path / f"out.{suffix}"
    with locked(target, is_folder=suffix == "parquet", overwrite=False):
        with pytest.raises(ConfigError, match=r"Another run is writing"):
            run(source, target)
        with pytest.raises(ConfigError, match=r"Another run is writing"):
            run(source, target, overwrite=True)
    assert run(source, target).num_done == len(ROWS)


def test_a_changed_job_is_refused_and_says_what_changed(tmp_path: Path, source: Path):
    target = tmp_path / "out.jsonl"
    run(source, target)
    before = target.read_bytes()
    changed = {**PARAMS, "temperature": 0.5}
    with pytest.raises(ConfigError, match=r"`sampling_params` was .*1\.0.* and is .*0\.5"):
        run(source, target, sampling_params=changed)
    with pytest.raises(ConfigError, match='`system` was null and is "Be brief"'):
        run(source, target, system="Be brief")
    assert target.read_bytes() == before
    report = run(source, target, sampling_params=changed, overwrite=True)
    assert report.num_done == len(ROWS)


def test_a_changed_sampler_is_refused_and_one_built_anew_is_not(tmp_path: Path, source: Path):
    def run_with(sampler: Any) -> Any:
        engine = FakeEngine()
        engine.sampler = sampler
        return run(source, tmp_path / "out.jsonl", engine=engine)

    def at_least(share: float) -> Any:
        def apply(logits: Any, state: Any, ctx: Any) -> Any:
            p = jax.nn.softmax(logits)
            return jnp.where(p >= share * p.max(-1, keepdims=True), logits, -jnp.inf)

        return chain(temperature(), LogitsTransform(apply))

    run_with(at_least(0.1))
    assert run_with(at_least(0.1)).num_skipped == len(ROWS)
    with pytest.raises(ConfigError, match=r'`sampler` was "code \w+" and is "code \w+"'):
        run_with(at_least(0.2))
    with pytest.raises(ConfigError, match=r'`sampler` was "code \w+" and is null'):
        run_with(None)
    with pytest.raises(ConfigError, match=r'`sampler` was "code \w+" and is null'):
        run_with(default_sampler())


def test_weights_in_memory_are_known_by_their_content(tmp_path: Path, source: Path):
    engine, target = FakeEngine(), tmp_path / "out.jsonl"
    engine.params = {"layer": {"w": jnp.ones((30, 100)), "b": np.zeros(7, np.float32)}}
    run(source, target, engine=engine)
    assert run(source, target, engine=engine).num_skipped == len(ROWS)
    engine.params = {"layer": {**engine.params["layer"], "w": jnp.full((30, 100), 1.001)}}
    with pytest.raises(ConfigError, match=r'`model` was "arrays \w+" and is "arrays \w+"'):
        run(source, target, engine=engine)


def test_updated_weights_are_another_model(tmp_path: Path, source: Path, checkpoint: Path):
    engine = FakeEngine()
    engine.config.model_path, engine.params = str(checkpoint), {"w": np.ones(3)}
    run(source, tmp_path / "out.jsonl", engine=engine)
    engine.version = "step 1"
    with pytest.raises(ConfigError, match=r'`model` was "\w+" and is "arrays \w+"'):
        run(source, tmp_path / "out.jsonl", engine=engine)


def test_a_job_without_a_result_binds_nobody(tmp_path: Path, source: Path):
    def fail(_: int) -> None:
        raise OSError("no device")

    with pytest.raises(OSError, match="no device"):
        run(source, tmp_path / "out.jsonl", engine=FakeEngine(fail))
    other = {**PARAMS, "temperature": 0.5}
    assert run(source, tmp_path / "out.jsonl", sampling_params=other).num_done == len(ROWS)


def test_a_seed_that_nobody_gave_is_kept(tmp_path: Path, source: Path):
    target = tmp_path / "out.jsonl"
    run(source, target, sampling_params={})
    expected = read_results(target)
    target.write_bytes(target.read_bytes()[:300])
    run(source, target, sampling_params={})
    assert read_results(target) == expected
    run(source, tmp_path / "other.jsonl", sampling_params={})
    assert read_results(tmp_path / "other.jsonl") != expected


def test_what_no_job_wrote_is_left_alone(tmp_path: Path, source: Path):
    target = tmp_path / "out.jsonl"
    target.write_text("precious\n")
    with pytest.raises(ConfigError, match=r"is no batch job's output"):
        run(source, target)
    assert target.read_text() == "precious\n"
    run(source, tmp_path / "mine.jsonl")
    with (tmp_path / "mine.jsonl").open("a") as file:
        file.write("scribble\n")
    with pytest.raises(ConfigError, match=r"Line 8 of .* is not a result"):
        run(source, tmp_path / "mine.jsonl")
    (tmp_path / "mine.jsonl.job.json").write_text("")
    with pytest.raises(ConfigError, match=r"What the job of .* was is lost"):
        run(source, tmp_path / "mine.jsonl")


def test_a_model_is_known_by_its_content(tmp_path: Path):
    for name in ("a", "b", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        data = bytearray(b"\x07" * 3_000_000)
        data[-1] += name == "tuned"
        (tmp_path / name / "model.safetensors").write_bytes(data)
    a, b, tuned = (model_identity(tmp_path / name) for name in ("a", "b", "tuned"))
    assert a == b != tuned
    shutil.rmtree(tmp_path / "b")


def test_a_kill_between_rows_leaves_a_job_that_goes_on(tmp_path: Path, source: Path):
    def kill(place: int) -> None:
        if place == 4:
            raise Killed

    with pytest.raises(Killed):
        batch.run(source, tmp_path / "out.jsonl", engine=FakeEngine(kill), sampling_params=PARAMS)
    assert run(source, tmp_path / "out.jsonl").num_skipped == 4
