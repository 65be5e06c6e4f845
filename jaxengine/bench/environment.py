"""What a number stands with: device, driver, versions, commit, and the backend of every kernel."""

import functools
import importlib.metadata
import logging
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxengine import __version__

PACKAGES = ("jax", "jaxlib", "flax")


def describe(device: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """Everything of the machine and the code that a result depends on.

    Args:
      device: `describe_device()`, of this process or of the one that was measured.
      commit: Overrides what git says, where the code travelled without its history.
    """
    found, is_dirty = git_commit()
    return {
        **device,
        "driver": nvidia_driver(),
        "versions": {
            "jaxengine": __version__,
            **{p: importlib.metadata.version(p) for p in PACKAGES},
        },
        "python": platform.python_version(),
        "host": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": commit or found,
        "is_dirty": None if commit else is_dirty,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_device() -> dict[str, Any]:
    """The device engines of this process run on."""
    import jax

    device = jax.devices()[0]
    is_gpu = device.platform == "gpu"
    return {
        "platform": device.platform,
        "gpu": device.device_kind if is_gpu else None,
        "device_kind": device.device_kind,
        "num_devices": jax.device_count(),
    }


def cpu_name() -> str:
    """The processor's name, where the kernel tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@functools.cache
def nvidia_driver() -> str | None:
    """The driver's version, if there is one that tells."""
    said = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said else None


@functools.cache
def git_commit() -> tuple[str, bool | None]:
    """Commit of this source tree and whether it was edited; ("unknown", None) outside git."""
    root = Path(__file__).resolve().parents[2]
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    # An installed package may lie inside somebody else's repository.
    if top is None or Path(top.strip()).resolve() != root:
        return "unknown", None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return (commit or "unknown").strip(), None if changes is None else bool(changes.strip())


class KernelLog(logging.Handler):
    """Listens to which implementation `pallas_kernels` chooses when a program is traced.

    Empty for programs that came out of the executable cache: they are not traced.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._chosen: dict[str, set[str]] = {}
        self._log = logging.getLogger("pallas_kernels")
        self._old_level = self._log.level
        self._log.setLevel(logging.INFO)
        self._log.addHandler(self)

    def close(self) -> None:
        """Stops listening."""
        self._log.removeHandler(self)
        self._log.setLevel(self._old_level)
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line such as "paged_decode_attention: triton"."""
        op, _, choice = record.getMessage().partition(": ")
        self._chosen.setdefault(op, set()).add(choice)

    def backends(self) -> dict[str, str]:
        """Op -> its implementation; several, with the reason, where some shapes were refused."""
        return {op: " | ".join(sorted(chosen)) for op, chosen in sorted(self._chosen.items())}

    def has_fallback(self) -> bool:
        """Whether plain XLA had to serve any op."""
        return any(c.startswith("reference") for chosen in self._chosen.values() for c in chosen)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
