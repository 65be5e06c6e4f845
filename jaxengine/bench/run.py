"""Runs a command's workloads in order, and publishes a result for each, whatever happens."""

import contextlib
import itertools
import json
import multiprocessing
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxengine.bench.environment import KernelLog, describe, describe_device
from jaxengine.bench.measure import Options, measure, open_engine
from jaxengine.bench.roofline import Peaks, peaks_of
from jaxengine.bench.startup import measure_startup
from jaxengine.bench.workloads import DEFAULT_SHAPE, STARTUP, WORKLOADS

type Result = dict[str, Any]


def run(names: Sequence[str], options: Options) -> int:
    """Runs workloads in the order given; 0 if every one ran and every check held.

    Each change of the model shape, and W5, gets a process of its own: it starts with all of the
    device's memory.
    """
    segments = [
        (subject, list(members))
        for subject, members in itertools.groupby(names, key=lambda name: _subject(name, options))
    ]
    if len(segments) == 1:
        return run_segment(*segments[0], options)
    codes = []
    for segment in segments:
        process = multiprocessing.get_context("spawn").Process(
            target=_run_and_exit, args=(*segment, options)
        )
        process.start()
        process.join()
        codes.append(process.exitcode)
    return int(any(codes))


def run_segment(shape: str, names: Sequence[str], options: Options) -> int:
    """Runs workloads of one shape on one engine, or W5; 0 if all is well."""
    if shape == STARTUP:
        results = _startup_results(options)
    else:
        results = _engine_results(shape, names, options)
    is_good = True
    for result in results:
        is_good &= result["is_correct"]
        _publish(result, options)
    return int(not is_good)


def _run_and_exit(shape: str, names: Sequence[str], options: Options) -> None:
    sys.exit(run_segment(shape, names, options))


def _subject(name: str, options: Options) -> str:
    """Workloads with the same answer, one after another, share a process."""
    return STARTUP if name == STARTUP else options.shape or WORKLOADS[name].shape


def _startup_results(options: Options) -> Iterator[Result]:
    try:
        rows = measure_startup(options)
    except Exception as error:
        yield _failure(STARTUP, options.shape or DEFAULT_SHAPE, error, options)
    else:
        for row in rows:
            yield _finished(row, row.pop("device"), options)


def _engine_results(shape: str, names: Sequence[str], options: Options) -> Iterator[Result]:
    with contextlib.closing(KernelLog()) as kernels:
        try:
            device = describe_device()
            subject = open_engine(shape, options)
        except Exception as error:
            # None of them can run; a second attempt would cost as much as the first.
            yield from [_failure(name, shape, error, options) for name in names]
            return
        with subject.engine:
            for name in names:
                try:
                    result = measure(name, subject, options, _peaks(device, options))
                except Exception as error:
                    yield _failure(name, shape, error, options)
                    continue
                result["kernels"] = kernels.backends()
                if device["platform"] == "gpu":
                    result["checks"]["no_kernel_fallback"] = not kernels.has_fallback()
                yield _finished(result, device, options)


def _peaks(device: dict[str, Any], options: Options) -> Peaks:
    known = peaks_of(device["device_kind"])
    return Peaks(*(given or measured for given, measured in zip(options.peaks, known, strict=True)))


def _finished(result: Result, device: dict[str, Any], options: Options) -> Result:
    result["is_correct"] = all(result["checks"].values())
    return {**result, "environment": describe(device, options.commit)}


def _failure(name: str, shape: str, error: Exception, options: Options) -> Result:
    traceback.print_exception(error)
    return {
        "workload": name,
        "shape": shape,
        "error": f"{type(error).__name__}: {error}",
        "is_correct": False,
        "environment": describe({}, options.commit),
    }


def _publish(result: Result, options: Options) -> None:
    line = json.dumps(result)
    print(line if options.is_json else _for_people(result), flush=True)
    if options.out:
        with Path(options.out).open("a") as file:
            file.write(line + "\n")


def _for_people(result: Result) -> str:
    if "error" in result:
        return f"{result['workload']:<16} FAILED: {result['error']}"
    wrong = [name for name, is_good in result["checks"].items() if not is_good]
    share = (result["roofline"] or {}).get("share_of_floor")
    return (
        f"{result['workload']:<16} {result['metric']:<20} {result['value']:>12,.3f} "
        f"{result['unit']:<6} spread {result['spread']:.3f}"
        + (f", {share:.0%} of the floor's speed" if share else "")
        + (f", WRONG: {', '.join(wrong)}" if wrong else ", correct")
    )
