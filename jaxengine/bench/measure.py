"""Runs workloads on an engine: one untimed pass, the timed ones, and the checks beside them."""

import statistics
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from jaxengine import Engine
from jaxengine.bench import checks
from jaxengine.bench.calls import Call
from jaxengine.bench.plain import PlainModel
from jaxengine.bench.roofline import UNKNOWN_PEAKS, Lengths, Peaks, Roofline, compare
from jaxengine.bench.shapes import write_config
from jaxengine.bench.workloads import WORKLOADS, Workload

SHOWN_SETTINGS = (
    "context_length",
    "max_running_requests",
    "max_total_tokens",
    "page_size",
    "max_window_steps",
    "decode_buckets",
    "prefill_buckets",
)
"""Settings every result names as they were resolved."""

MAX_WARMUPS = 6
"""Untimed passes after which a workload that still compiles something is an error."""

type Output = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asked for.

    Attributes:
      shape: Model shape; each workload's own when None.
      dtype: Of weights and activations.
      settings: Further `EngineConfig` fields.
      cache_dir: Executable cache; None compiles everything anew, so kernels can be named.
      runs: Timed passes of each workload.
      scale: Factor on counts and lengths.
      peaks: Instead of the device's measured peaks, where not None.
      profile_dir: Where a trace of one further pass goes.
      commit: Overrides what git says.
      is_json: Print JSON lines rather than a line for people.
      out: File that JSON lines are appended to.
    """

    shape: str | None = None
    dtype: str = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    cache_dir: str | None = None
    runs: int = 3
    scale: float = 1.0
    peaks: Peaks = UNKNOWN_PEAKS
    profile_dir: str | None = None
    commit: str | None = None
    is_json: bool = False
    out: str | None = None


class Subject(NamedTuple):
    """An engine whose programs are all ready.

    Attributes:
      engine: It.
      shape: Name of its model shape.
      startup: Seconds its start took, and what it says of them.
      plain: The same model by the plain path, in float32.
      rounded: By the plain path in the engine's dtype.
      tolerance: In which they must agree, in nats, unless rounding alone costs more.
    """

    engine: Engine
    shape: str
    startup: dict[str, Any]
    plain: PlainModel
    rounded: PlainModel
    tolerance: float


class Pass(NamedTuple):
    """All calls of a workload, made once.

    Attributes:
      call_seconds: Of each call.
      outputs: Of each call.
      counters: What the engine's counts grew by.
      host_seconds: What the engine's own times grew by.
    """

    call_seconds: list[float]
    outputs: list[list[Output]]
    counters: dict[str, int]
    host_seconds: dict[str, float]

    @property
    def ids(self) -> list[list[list[int]]]:
        """Tokens by call and request."""
        return [[output["output_ids"] for output in outputs] for outputs in self.outputs]


def open_engine(shape: str, options: Options) -> Subject:
    """Builds an engine with random weights and waits for every program."""
    started = time.perf_counter()
    engine = make_engine(shape, options.dtype, options.settings, options.cache_dir)
    built = time.perf_counter()
    engine.wait_until_compiled(background=True)
    stats = engine.stats()
    startup = {
        "build_s": built - started,
        "compile_s": time.perf_counter() - built,
        "engine": stats["startup_seconds"],
        "programs": stats["programs"],
    }
    tolerance = checks.TOLERANCES[engine.config.dtype]
    plain, rounded = (
        PlainModel(engine.model_config, engine.params, tolerance, dtype)
        for dtype in ("float32", engine.config.dtype)
    )
    return Subject(engine, shape, startup, plain, rounded, tolerance)


def make_engine(
    shape: str, dtype: str, settings: Mapping[str, Any], cache_dir: str | None
) -> Engine:
    """An engine of a shape of the table, ids in and ids out."""
    with tempfile.TemporaryDirectory() as folder:
        return Engine(
            str(write_config(shape, Path(folder))),
            load_format="dummy",
            disable_radix_cache=True,
            skip_tokenizer_init=True,
            dtype=dtype,
            executable_cache=cache_dir is not None,
            cache_dir=cache_dir,
            progress=False,
            served_model_name=shape,
            **settings,
        )


def generate(engine: Engine, call: Call) -> list[Output]:
    """Makes one call and waits for it."""
    return cast(
        list[Output],
        engine.generate(
            input_ids=call.input_ids,
            sampling_params=call.sampling_params,
            **call.arguments,
        ),
    )


def run_pass(engine: Engine, calls: Sequence[Call]) -> Pass:
    """Makes the calls one after another."""
    before = engine.stats()
    seconds, outputs = [], []
    for call in calls:
        started = time.perf_counter()
        outputs.append(generate(engine, call))
        seconds.append(time.perf_counter() - started)
    after = engine.stats()
    counters = {
        name: value - before[name]
        for name, value in after.items()
        if isinstance(value, int) and name.startswith("num_") and value != before[name]
    }
    host = {name: value - before["seconds"][name] for name, value in after["seconds"].items()}
    return Pass(seconds, outputs, counters, host)


def warm_up(engine: Engine, calls: Sequence[Call]) -> Pass:
    """Untimed passes until nothing more is compiled for them; the last of them.

    A sampler that calls bring along begins in split form, and its fused form is compiled as it is
    used.

    Raises:
      RuntimeError: If there is no end to it.
    """
    for _ in range(MAX_WARMUPS):
        num_before = engine.stats()["programs"]["num_programs"]
        warmup = run_pass(engine, calls)
        engine.wait_until_compiled(background=True)
        if engine.stats()["programs"]["num_programs"] == num_before:
            return warmup
    raise RuntimeError(f"Programs were still compiled in untimed pass {MAX_WARMUPS}.")


def profile(engine: Engine, calls: Sequence[Call], folder: Path) -> None:
    """Traces one further pass; a profiler that fails costs the trace, not the result."""
    import jax

    try:
        with jax.profiler.trace(str(folder)):
            run_pass(engine, calls)
    except jax.errors.JaxRuntimeError as error:
        traceback.print_exception(error)


def measure(name: str, subject: Subject, options: Options, peaks: Peaks) -> dict[str, Any]:
    """Runs a workload; the result without its environment.

    Args:
      name: Of the workload.
      subject: Its engine.
      options: Number of passes, scale, trace.
      peaks: What the roofline compares with.
    """
    workload, engine = WORKLOADS[name], subject.engine
    calls = workload.calls(options.scale, engine.model_config.vocab_size)
    started = time.perf_counter()
    warmup = warm_up(engine, calls)
    warmup_s = time.perf_counter() - started
    passes = [run_pass(engine, calls) for _ in range(options.runs)]
    trace = None if options.profile_dir is None else Path(options.profile_dir) / name
    if trace is not None:
        profile(engine, calls, trace)
    metric, call = workload.metric, calls[-1]
    seconds = [metric.seconds(p.call_seconds) for p in passes]
    middle = passes[seconds.index(statistics.median_low(seconds))]
    runs = [metric.value(s, call) for s in seconds]
    held, agreement = _check(workload, subject, calls, warmup, passes)
    return {
        "workload": name,
        "title": workload.title,
        "metric": metric.name,
        **summarise(runs, metric.unit),
        "shape": subject.shape,
        "dtype": engine.config.dtype,
        "scale": options.scale,
        "warmup_s": warmup_s,
        "startup": subject.startup,
        "settings": {s: getattr(engine.config, s) for s in SHOWN_SETTINGS},
        "num_windows": middle.counters.get("num_windows", 0),
        "mean_window_steps": middle.counters.get("num_window_steps", 0)
        / max(1, middle.counters.get("num_windows", 0)),
        "counters": middle.counters,
        "host_seconds": middle.host_seconds,
        "roofline": _roofline(workload, subject, calls, middle, peaks),
        "checks": held,
        "agreement": agreement,
        "profile": None if trace is None else str(trace),
    }


def summarise(runs: Sequence[float], unit: str) -> dict[str, Any]:
    """Median of the runs, and the largest minus the smallest."""
    return {
        "value": statistics.median(runs),
        "unit": unit,
        "runs": list(runs),
        "median": statistics.median(runs),
        "spread": max(runs) - min(runs),
    }


def _check(
    workload: Workload,
    subject: Subject,
    calls: Sequence[Call],
    warmup: Pass,
    passes: Sequence[Pass],
) -> tuple[dict[str, bool], dict[str, float]]:
    """Checks that must hold, and shares of equal tokens that rounding may lower."""
    engine, call = subject.engine, calls[-1]
    vocab_size = engine.model_config.vocab_size
    results = [
        checks.check_outputs(one, outputs, vocab_size)
        for p in (warmup, *passes)
        for one, outputs in zip(calls, p.outputs, strict=True)
    ]
    held = {name: all(r.get(name, True) for r in results) for r in results for name in r}
    replays = [_share_equal(warmup.ids[-1], p.ids[-1]) for p in passes]
    alone = [output["output_ids"] for output in generate(engine, call.first(1))]
    agreement = {"replay": min(replays), "alone": _share_equal(alone, warmup.ids[-1][:1])}
    held["plain_path_ran"] = True
    try:
        judged = checks.judged_call(call, engine.config.max_running_requests or 1)
        outputs = generate(engine, judged)
        comparison = checks.compare(
            judged, outputs, subject.plain, subject.rounded, subject.tolerance
        )
    except Exception as error:
        # The oracle may need more memory than the engine leaves; what was timed is not lost.
        traceback.print_exception(error)
        held["plain_path_ran"] = False
    else:
        held |= comparison.checks
        agreement |= comparison.numbers
    if workload.is_replayable:
        held["replays_identical"] = all(p.ids == warmup.ids for p in passes)
        held["calls_agree"] = all(
            short == long[: len(short)]
            for ids in warmup.ids
            for short, long in zip(ids, warmup.ids[-1], strict=True)
        )
    if engine.config.dtype == "float32":
        held["alone_as_in_batch"] = agreement["alone"] == 1.0
    return held, agreement


def _share_equal(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Share of tokens before the first difference of each row."""
    same = 0
    for a, b in zip(left, right, strict=True):
        pairs = zip(a, b, strict=False)
        same += next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    return same / sum(map(len, left))


def _roofline(
    workload: Workload, subject: Subject, calls: Sequence[Call], run: Pass, peaks: Peaks
) -> dict[str, Any]:
    engine, call = subject.engine, calls[-1]
    lengths = [
        Lengths(len(ids), params["max_new_tokens"])
        for ids, params in zip(call.input_ids, call.sampling_params, strict=True)
    ]
    roofline = Roofline(engine.model_config, engine.config.dtype, lengths)
    # Counters hold all calls of the pass; a call for one token has no decode step.
    num_decoding = sum(c.num_output_tokens > len(c.input_ids) for c in calls)
    num_steps = run.counters.get("num_window_steps", 0) / max(1, num_decoding)
    num_prefills = run.counters.get("num_prefills", 0) / len(calls)
    min_steps = roofline.min_steps(engine.config.max_running_requests or 1)
    done, least = [roofline.decode(num_steps)], [roofline.decode(min_steps)]
    if workload.metric.has_prefill:
        done.append(roofline.prefill(num_prefills))
        least.append(roofline.prefill(1))
    seconds = workload.metric.seconds(run.call_seconds)
    return {
        "weight_bytes_per_step": roofline.weight_bytes,
        "num_steps": num_steps,
        "min_steps": min_steps,
        **compare(done, least, seconds, peaks),
    }
