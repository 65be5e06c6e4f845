"""Traces of what the process does, by JAX's profiler. There is one at a time in a process."""

import tempfile
from pathlib import Path

import jax


class Profile:
    """A trace under way."""

    def __init__(self, output_dir: str | None) -> None:
        """Starts it.

        Args:
          output_dir: Where it will be written; a fresh temporary folder when None.

        Raises:
          RuntimeError: If one is under way.
        """
        self._folder = Path(output_dir or tempfile.mkdtemp(prefix="jaxengine-profile-"))
        jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)

    def stop(self) -> Path:
        """Writes it; gives the file to open at ui.perfetto.dev, beside which TensorBoard's lie."""
        jax.profiler.stop_trace()
        written = self._folder.rglob("perfetto_trace.json.gz")
        return max(written, key=lambda path: path.stat().st_mtime)
