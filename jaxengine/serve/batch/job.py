"""A batch job: rows in, results out, and nothing kept that does not have to be."""

import contextlib
import dataclasses
import itertools
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jaxengine
from jaxengine.config import EngineConfig
from jaxengine.errors import ConfigError, JobError
from jaxengine.params import fresh_seed
from jaxengine.progress import Progress
from jaxengine.serve.batch.check import (
    check_request,
    folder_of,
    model_config_of,
    records_of,
    row_reader,
)
from jaxengine.serve.batch.config import BatchConfig, Report
from jaxengine.serve.batch.keys import Keys
from jaxengine.serve.batch.lines import LineFile, StandardOutput
from jaxengine.serve.batch.parts import PartFolder
from jaxengine.serve.batch.read import count, format_of, parquet_files
from jaxengine.serve.batch.results import ResultWriter
from jaxengine.serve.batch.rows import SEEDS, Row, max_tokens, passed_fields
from jaxengine.serve.batch.sidecar import (
    Sidecar,
    locked,
    model_identity,
    sampler_identity,
    weights_identity,
)

HARMLESS = frozenset(
    """
    cache_dir chunked_prefill_size decode_buckets download_dir executable_cache log_level
    max_running_requests max_total_tokens max_window_steps mem_fraction_static page_size
    prefill_buckets progress schedule_policy served_model_name
    """.split()
)
"""Settings of an engine that may differ from run to run of a job: they change no distribution."""


class Output(Protocol):
    """Where results go."""

    def append(self, result: dict[str, Any]) -> None:
        """Adds a result."""
        ...

    def close(self) -> None:
        """Puts everything on the disk."""
        ...


def run(
    source: str | Path,
    target: str | Path,
    *,
    model_path: str = "",
    engine: Any = None,
    sampler: Any = None,
    engine_settings: dict[str, Any] | None = None,
    config: BatchConfig | None = None,
    **settings: Any,
) -> Report:
    """Runs a batch job, or goes on with it where an earlier run stopped.

    Ctrl-C and SIGTERM, where this is the main thread, let the rows under way end and return; a
    second one drops them.

    Args:
      source: Input: a file, a folder of Parquet parts, or "-".
      target: Output: a file, a name that ends in `.parquet` for a folder of parts, or "-".
      model_path: As for `Engine`; not needed with an engine.
      engine: One that is there already, and is left running.
      sampler: As for `Engine`. Its code, what it closes over and the globals it names are part of
        what the job is.
      engine_settings: Further settings of the engine.
      config: Settings of the job.
      **settings: The same, one by one.

    Returns:
      What was done; error rows are counted, not raised.

    Raises:
      ConfigError: For settings, an input or an output that cannot be used, and for an output that
        was begun with another model, another sampler or other settings.
      JobError: Beyond `max_errors`.
      OSError: When the disk is full, for example; run it again to go on.
    """
    config = dataclasses.replace(config or BatchConfig(), **settings)
    source, target = str(source), Path(target)
    if source != "-" and not Path(source).exists():
        raise ConfigError(f"The input {source!r} does not exist.")
    if config.shard is not None and str(target) != "-":
        target = config.shard.path(target)
    folder = _model_folder(engine, model_path)
    if engine is None and sampler is None and folder is not None:
        # A parameter that no row can have is better told now than row by row.
        check_request(config.sampling_params, [0], model_config_of(folder))
    with contextlib.ExitStack() as stack:
        is_piped, is_folder = str(target) == "-", target.suffix == ".parquet"
        sidecar = None
        if not is_piped:
            held = locked(target, is_folder=is_folder, overwrite=config.overwrite)
            sidecar = stack.enter_context(held)
        job = {
            "model": _model(engine, folder),
            "sampler": sampler_identity(sampler if engine is None else engine.sampler),
            "engine": {k: v for k, v in (engine_settings or {}).items() if k not in HARMLESS},
            **config.identity(),
        }
        decided = _decide(job, config, sidecar)
        keys = stack.enter_context(contextlib.closing(Keys()))
        report = Report(output=None if is_piped else str(target))
        output = stack.enter_context(contextlib.closing(_open(source, target, config)))
        if not is_piped:
            _read_done(output, keys, report, config.retry_errors)
        if engine is None:
            more = engine_settings or {}
            engine = stack.enter_context(
                jaxengine.Engine(model_path=model_path, sampler=sampler, **more)
            )
        _Job(engine, config, decided, keys, report).run(source, output)
    return report


class _Job:
    """The loop over rows."""

    def __init__(
        self, engine: Any, config: BatchConfig, decided: dict[str, Any], keys: Keys, report: Report
    ) -> None:
        self._engine, self._config, self._keys, self._report = engine, config, keys, report
        self._params = {**config.sampling_params, "seed": decided["seed"]}
        self._params.pop("sampling_seed", None)
        name = engine.config.served_model_name or Path(engine.config.model_path).name
        self._writer = ResultWriter(
            output_ids=config.output_ids, created=decided["created"], model=name
        )
        # Rows that the engine has, by their place among those it was given.
        self._rows: dict[int, Row] = {}
        self._is_stopping = False

    def run(self, source: str, output: Output) -> None:
        config, report = self._config, self._report
        started = time.perf_counter()
        shares = 1 if config.shard is None else config.shard.count
        shows = sys.stderr.isatty() if config.progress is None else config.progress
        # Counting reads the whole input once more; only somebody who looks pays for it.
        total = count(source, format_of(source, config.format)) if shows else None
        if total is not None:
            total = min(total, config.limit or total) // shares
        with (
            self._stops_gently(),
            Progress(total, self._engine.stats, unit="row", is_shown=shows) as bar,
        ):
            results = self._engine.imap(
                self._items(source, bar),
                max_in_flight=config.max_in_flight,
                ordered=config.is_ordered,
                on_error="return",
            )
            places = itertools.count()
            with contextlib.closing(results):
                for item in results:
                    place, result = (next(places), item) if config.is_ordered else item
                    self._take(self._rows.pop(place), result, output)
                    bar.update(result)
        report.is_interrupted = self._is_stopping
        report.seconds = time.perf_counter() - started

    def _items(self, source: str, bar: Progress) -> Iterator[Any]:
        """What the engine is given; a bad row is an exception in its place."""
        engine = self._engine
        reader = row_reader(
            source, self._config, engine.tokenizer, max_tokens(engine), self._keys, self._params
        )
        place = itertools.count()
        for row in reader.read(records_of(source, self._config)):
            if self._is_stopping:
                return
            self._report.num_rows += 1
            if self._keys.is_done(row.key):
                self._report.num_skipped += 1
                bar.skip()
                continue
            self._rows[next(place)] = row
            yield row.arguments if row.error is None else row.error

    def _take(self, row: Row, result: Any, output: Output) -> None:
        report, limit = self._report, self._config.max_errors
        laid_out = self._writer.lay_out(row, result)
        output.append(laid_out)
        report.num_done += 1
        if laid_out["error"] is None:
            outputs = result if isinstance(result, list) else [result]
            num_tokens = outputs[0]["meta_info"]["prompt_tokens"]
            report.prompt_tokens += num_tokens
            report.max_prompt_tokens = max(report.max_prompt_tokens, num_tokens)
            report.completion_tokens += sum(o["meta_info"]["completion_tokens"] for o in outputs)
            return
        report.num_errors += 1
        if limit is not None and report.num_errors > limit:
            raise JobError(
                f"{report.num_errors} rows failed and `max_errors` is {limit}; the last: "
                f"{laid_out['error']['message']} Mend the input or raise `max_errors`, and run "
                "the job again: it goes on from here."
            )

    @contextlib.contextmanager
    def _stops_gently(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM stops taking rows; the second is as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(*_: object) -> None:
            self._is_stopping = True
            for number, handler in before.items():
                signal.signal(number, handler)
            print("\nStopping: rows under way are written first.", file=sys.stderr)

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _decide(job: dict[str, Any], config: BatchConfig, sidecar: Sidecar | None) -> dict[str, Any]:
    """What is chosen once in a job's life: its seed, and its time for OpenAI's objects."""
    given = [config.sampling_params.get(name) for name in SEEDS]
    seed = next((seed for seed in given if seed is not None), None)
    fresh = {"seed": fresh_seed() if seed is None else seed, "created": int(time.time())}
    return fresh if sidecar is None else sidecar.settle(job, fresh)


def _model(engine: Any, folder: Path | None) -> str:
    """Which weights: those of the checkpoint, unless the engine was given others."""
    if engine is not None:
        is_updated = engine.get_model_info()["weight_version"] != engine.config.weight_version
        if folder is None or is_updated:
            return weights_identity(engine.params)
    assert folder is not None, "without an engine there is a model_path"
    return model_identity(folder)


def _model_folder(engine: Any, model_path: str) -> Path | None:
    """Where the weights lie; None for an engine over arrays."""
    path = model_path or (engine.config.model_path if engine is not None else "")
    if engine is None and not path:
        raise ConfigError("`model_path` or `engine` must be given.")
    return folder_of(EngineConfig(model_path=path)) if path else None


def _open(source: str, target: Path, config: BatchConfig) -> Any:
    if str(target) == "-":
        return StandardOutput()
    if target.suffix != ".parquet":
        return LineFile(target, config.sync_s)
    columns = None
    if format_of(source, config.format) == "parquet":
        columns = passed_fields(parquet_files(source)[0].schema_arrow, config)
    return PartFolder(target, columns, config.rows_per_part, 12 * config.sync_s)


def _read_done(output: Any, keys: Keys, report: Report, retry_errors: bool) -> None:
    """Learns what earlier runs did, and drops their error rows where they are tried again."""
    for result in output.results():
        if result["error"] is not None:
            report.num_errors_before += 1
            if retry_errors:
                continue
        keys.add_done(result["id"])
    if retry_errors and report.num_errors_before:
        output.keep(lambda result: result["error"] is None)
        report.num_errors_before = 0
