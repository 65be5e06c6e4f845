"""What is compiled, and compiled programs on disk.

A warm start traces nothing: an executable's key comes from the configuration, the versions, the
device and the source, not from a lowering.
"""

import hashlib
import importlib
import importlib.metadata
import os
import pickle
import platform
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

from jaxengine.errors import ConfigError
from jaxengine.log import logger

GPU_WINDOW_OPTIONS: dict[str, str | int] = {
    "xla_gpu_enable_command_buffer": (
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": 1,
}
"""Makes a whole decode window one CUDA graph with a conditional loop node: the host is away."""


@dataclass(frozen=True, kw_only=True)
class ProgramSpec:
    """A function and the shapes to compile it for.

    Attributes:
      name: For profiles and progress, e.g. "decode_b32".
      fn: Pure function of `args`.
      args: Abstract arguments, placed on the mesh.
      donate: Positions of donated arguments.
      options: XLA compiler options.
      cost: Rough relative work; the most expensive are compiled first.
      is_cached: The executable cache's keys cover all that it depends on.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    options: Mapping[str, str | int] = field(default_factory=dict)
    cost: int = 0
    is_cached: bool = True

    def lower(self) -> Any:
        """Traces and lowers; `.compile(compiler_options=...)` is the slow half, without the GIL."""

        def named(*args: Any) -> Any:
            return self.fn(*args)

        named.__name__ = self.name
        return jax.jit(named, donate_argnums=self.donate).lower(*self.args)


class ExecutableCache:
    """Serialised executables in a folder that only its owner may touch.

    Loading unpickles, so the folder is refused when others could have written to it.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise ConfigError(
                f"`cache_dir` {folder} must belong to you and be closed to others (mode 0700), "
                f"got owner {info.st_uid} and mode {stat.S_IMODE(info.st_mode):04o}; "
                f"run `chmod 700 {folder}`, choose another folder, or set executable_cache=False."
            )
        self._folder = folder
        self._fingerprint = fingerprint

    def _path(self, spec: ProgramSpec) -> Path:
        described = repr((self._fingerprint, spec.name, sorted(spec.options.items())))
        return self._folder / f"{spec.name}-{hashlib.sha256(described.encode()).hexdigest()[:32]}"

    def load(self, spec: ProgramSpec) -> Any | None:
        """The executable, or None when there is none that loads here."""
        try:
            payload = self._path(spec).read_bytes()
            if b"mosaic_gpu" in payload:
                # Its kernels need a library that JAX makes known when this is imported.
                importlib.import_module("jax.experimental.mosaic.gpu")
            return serialize_executable.deserialize_and_load(*pickle.loads(payload))
        except FileNotFoundError:
            return None
        except Exception as error:
            logger.warning("cannot load %s from the executable cache: %s", spec.name, error)
            return None

    def store(self, spec: ProgramSpec, compiled: Any) -> None:
        """Writes the executable; a failure costs the next start time, nothing else."""
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(payload)
            os.replace(file.name, self._path(spec))
        except Exception as error:
            logger.warning("cannot store %s in the executable cache: %s", spec.name, error)


TRACED_ROOMS = (
    "pallas_kernels",
    "jaxengine/models",
    "jaxengine/nn",
    "jaxengine/runtime",
    "jaxengine/sampling",
    "jaxengine/scheduler",
)
"""Folders whose source decides what a compiled step does."""


def fingerprint(*parts: object) -> str:
    """What an executable depends on beside its shapes: versions, device, source, configuration."""
    device = jax.devices()[0]
    source = hashlib.sha256()
    root = Path(__file__).parents[2]
    for room in TRACED_ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            source.update(path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
    backend = (device.platform, device.device_kind, device.client.platform_version)
    flags = os.environ.get("XLA_FLAGS", "")
    return repr((versions, backend, platform.machine(), flags, source.hexdigest(), *parts))


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/jaxengine/executables`, or below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxengine" / "executables"
