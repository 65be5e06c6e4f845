"""The file beside an output: what the job is, and the lock that keeps a second run away."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxengine.errors import ConfigError
from jaxengine.serve.batch.parts import MANIFEST

VERSION = 1
SAMPLES, SAMPLE_BYTES = 16, 1 << 16
"""How much of a weights file is looked at: fine-tunes differ everywhere."""

SAMPLED_ITEMS = 1024
"""Of an array in memory, likewise."""


def model_identity(folder: Path) -> str:
    """A hash that two checkpoints share when they are the same model, wherever they lie.

    Args:
      folder: The checkpoint; a single file for formats that are one.
    """
    digest = hashlib.sha256()
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in names:
        path = folder / name
        digest.update(path.read_bytes() if path.exists() else b"-")
    weights = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{size}".encode())
        with path.open("rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def weights_identity(params: Any) -> str:
    """The same for arrays in memory.

    Args:
      params: A pytree of them.
    """
    from jax import tree  # not before a job runs

    digest = hashlib.sha256()
    for array in tree.leaves(params):
        step = max(1, array.size // SAMPLED_ITEMS)
        digest.update(f"{array.shape} {array.dtype}".encode())
        digest.update(np.asarray(array.ravel()[::step]).tobytes())
    return f"arrays {digest.hexdigest()[:16]}"


def sampler_identity(sampler: Any) -> str | None:
    """The code of a sampler, what it closes over and the globals it names; None for the built-in.

    Args:
      sampler: As `Engine` takes it; None is the built-in one.
    """
    if sampler is None:
        return None
    from jaxengine.sampling import as_sampler, default_sampler
    from jaxengine.sampling.identity import are_equal, digest_of

    sampler = as_sampler(sampler)
    return None if are_equal(sampler, default_sampler()) else f"code {digest_of(sampler)}"


@contextlib.contextmanager
def locked(output: Path, *, is_folder: bool, overwrite: bool) -> Iterator["Sidecar"]:
    """Holds an output: nobody else may run a job into it.

    Args:
      output: Where the job writes.
      is_folder: It is a folder of parts, which is made here.
      overwrite: What is there is removed.

    Raises:
      ConfigError: If another run holds it, or it is no job's output.
    """
    path = output / "_job.json" if is_folder else output.with_name(f"{output.name}.job.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_foreign = (
            output.exists() and not path.exists() and (not is_folder or any(output.iterdir()))
        )
        if is_foreign and not overwrite:
            raise ConfigError(
                f"{output} exists and is no batch job's output. Name another, or pass `overwrite`."
            )
        path.touch()
        file = path.open("r+")
    except OSError as error:
        raise ConfigError(f"The output {output} cannot be written: {error.strerror}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"Another run is writing {output}. Wait for it, or name another output."
            ) from error
        if overwrite:
            file.truncate(0)
            for old in output.iterdir() if is_folder else [output]:
                if old.is_dir():
                    shutil.rmtree(old)
                elif old != path:
                    old.unlink(missing_ok=True)
        marker = output / MANIFEST if is_folder else output
        yield Sidecar(file, output, has_results=marker.exists() and marker.stat().st_size > 0)


class Sidecar:
    """A held job file."""

    def __init__(self, file: Any, output: Path, *, has_results: bool) -> None:
        self._file = file
        self._output = output
        self._has_results = has_results

    def settle(self, job: Mapping[str, Any], fresh: Mapping[str, Any]) -> dict[str, Any]:
        """Writes down what the job is, or checks that it still is what was written down.

        Args:
          job: What may not change.
          fresh: What is decided when the job begins, and kept.

        Returns:
          What was decided.

        Raises:
          ConfigError: Says what changed.
        """
        self._file.seek(0)
        try:
            before = json.loads(self._file.read())
        except json.JSONDecodeError:  # new, or torn when it was written
            before = None
        now = json.loads(json.dumps({"version": VERSION, **job}, default=str))
        if before is None and self._has_results:
            raise ConfigError(
                f"What the job of {self._output} was is lost: {self._file.name} is empty. Pass "
                "`overwrite` to begin anew, or name another output."
            )
        if before is None or not self._has_results:
            # A job that failed before its first result binds nobody.
            self._write({**now, "decided": fresh})
            return dict(fresh)
        changed = [
            f"`{name}` was {json.dumps(before.get(name))} and is {json.dumps(value)}"
            for name, value in now.items()
            if before.get(name) != value
        ]
        if changed:
            raise ConfigError(
                f"{self._output} was begun by another job: {'; '.join(changed)}. Run it as it was, "
                "name another output, or pass `overwrite` to begin anew."
            )
        return before["decided"]

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.seek(0)
        self._file.truncate()
        json.dump(content, self._file, indent=1)
        self._file.flush()
        os.fsync(self._file.fileno())
