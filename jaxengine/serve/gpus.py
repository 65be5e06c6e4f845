"""One process and one shard for each GPU of a host."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jaxengine.errors import ConfigError

WORST_FIRST = (1, 2, 130, 3)
"""Exit codes of `jaxengine run`: stopped, misused, interrupted, ended with error rows."""


def run_on_gpus(num_gpus: int, argv: Sequence[str], *, has_shard: bool) -> int:
    """Runs the same command once for each GPU, as shards 0/n to n-1/n; returns the worst exit code.

    A shard that dies leaves the others running; the same command goes on with it.

    Args:
      num_gpus: How many, at least 1. `CUDA_VISIBLE_DEVICES`, where it is set, says which.
      argv: The command line, with its `--gpus`.
      has_shard: The command line names a shard already.

    Raises:
      ConfigError: For a number that does not fit.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(max(0, num_gpus))]
    if num_gpus < 1 or len(devices) < num_gpus:
        raise ConfigError(
            f"`--gpus` must be at least 1 and at most the {len(devices)} GPUs of "
            f"CUDA_VISIBLE_DEVICES ({visible}), got {num_gpus}."
        )
    if has_shard:
        raise ConfigError("`--gpus` makes the shards itself; leave `--shard` out.")
    if "-" in argv:
        raise ConfigError("`--gpus` needs files: standard input and output cannot be shared.")
    command = [sys.executable, "-m", "jaxengine.serve.cli", *without_gpus(argv)]
    children = [
        subprocess.Popen(
            [*command, "--shard", f"{i}/{num_gpus}", *(["--no-progress"] if i else [])],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": devices[i]},
        )
        for i in range(num_gpus)
    ]
    # Ctrl-C reaches the children through the terminal; SIGTERM only this process.
    before = signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    try:
        codes = [_wait(child) for child in children]
    finally:
        signal.signal(signal.SIGTERM, before)
    died = [i for i, code in enumerate(codes) if code < 0]
    if died:
        print(
            f"jaxengine: shards {died} were killed; run the command again to go on with them.",
            file=sys.stderr,
        )
    codes = [1 if code < 0 else code for code in codes]
    return next((code for code in WORST_FIRST if code in codes), 0)


def without_gpus(argv: Sequence[str]) -> list[str]:
    """The command line without its `--gpus`."""
    kept, rest = [], iter(argv)
    for argument in rest:
        if argument == "--gpus":
            next(rest, None)
        elif not argument.startswith("--gpus="):
            kept.append(argument)
    return kept


def _wait(child: Any) -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child has got it, too, and ends in its own way
            continue
