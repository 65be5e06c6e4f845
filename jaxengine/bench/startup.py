"""W5: from the start of a process to its second token and to its last program, by this clock."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxengine.bench.calls import Call, prompts, request_params, scaled
from jaxengine.bench.environment import describe_device
from jaxengine.bench.measure import Options, generate, make_engine, summarise
from jaxengine.bench.workloads import DEFAULT_SHAPE, STARTUP

CHILD = "_start"
"""First argument of `python -m jaxengine.bench` in the process that is measured."""

TIMEOUT_S = 900.0

EVENTS = ("started", "engine_ready", "second_token", "all_ready")
"""What the process says, in order: interpreter up, `Engine()` returned, and the two results."""


class Start(NamedTuple):
    """One start.

    Attributes:
      seconds: Event -> seconds after the process was asked for.
      report: What the process said of itself.
    """

    seconds: dict[str, float]
    report: dict[str, Any]


def measure_startup(options: Options) -> list[dict[str, Any]]:
    """Starts processes with empty caches, and each once more with what the first left behind."""
    starts: dict[str, list[Start]] = {"cold": [], "warm": []}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="jaxengine-bench-") as caches:
            starts["cold"].append(_start(options, Path(caches)))
            starts["warm"].append(_start(options, Path(caches)))
    tokens = [start.report["output_ids"] for every in starts.values() for start in every]
    same = all(ids == tokens[0] for ids in tokens)
    return [
        _row(temperature, event, every, options, same)
        for event in ("second_token", "all_ready")
        for temperature, every in starts.items()
    ]


def _row(
    temperature: str, event: str, starts: list[Start], options: Options, same: bool
) -> dict[str, Any]:
    unused = "num_loaded" if temperature == "cold" else "num_compiled"
    last = starts[-1].report
    return {
        "workload": STARTUP,
        "title": f"process start to {event.replace('_', ' ')}, caches {temperature}",
        "metric": f"{temperature}_{event}",
        **summarise([start.seconds[event] for start in starts], "s"),
        "shape": last["shape"],
        "dtype": last["dtype"],
        "scale": options.scale,
        "split": [start.seconds for start in starts],
        "startup": [start.report["startup"] for start in starts],
        "device": last["device"],
        "roofline": None,
        "checks": {
            "two_tokens": all(len(start.report["output_ids"]) == 2 for start in starts),
            "same_tokens_in_every_process": same,
            f"{temperature}_caches": not any(
                s.report["startup"]["programs"][unused] for s in starts
            ),
        },
    }


def _start(options: Options, caches: Path) -> Start:
    """Starts a process and takes the time of every line it says."""
    request = {
        "shape": options.shape or DEFAULT_SHAPE,
        "dtype": options.dtype,
        "settings": dict(options.settings),
        "cache_dir": str(caches / "executables"),
        "prompt_len": scaled(32, options.scale),
    }
    # Every cache that a process may find, the driver's and Triton's too.
    environment = os.environ | {
        "XDG_CACHE_HOME": str(caches),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "jaxengine.bench", CHILD, json.dumps(request)]
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    report: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        timer = threading.Timer(TIMEOUT_S, process.kill)
        timer.start()
        for line in process.stdout or ():
            now = time.perf_counter() - started
            if line.startswith('{"event"'):
                message = json.loads(line)
                seconds[message.pop("event")] = now
                report |= message
        timer.cancel()
    if process.returncode or tuple(seconds) != EVENTS:
        raise RuntimeError(
            f"The process ended with code {process.returncode} after {[*seconds]}, not {EVENTS}; "
            "what it wrote to stderr is above."
        )
    return Start(seconds, report)


def run_child(request: Mapping[str, Any]) -> None:
    """What the measured process does: an engine, two tokens, all programs."""
    _say("started")
    shape, settings = request["shape"], request["settings"]
    engine = make_engine(shape, request["dtype"], settings, request["cache_dir"])
    try:
        _say("engine_ready")
        ids = prompts(STARTUP, [request["prompt_len"]], engine.model_config.vocab_size)
        call = Call(ids, [request_params(0, 2, temperature=0.0)])
        output = generate(engine, call)[0]
        _say("second_token", output_ids=output["output_ids"])
        engine.wait_until_compiled()
        stats = engine.stats()
        _say(
            "all_ready",
            shape=shape,
            dtype=engine.config.dtype,
            startup={"engine": stats["startup_seconds"], "programs": stats["programs"]},
            device=describe_device(),
        )
    finally:
        engine.shutdown()


def _say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)
