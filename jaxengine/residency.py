"""What an engine has on its device, and may change while it runs: its weights, and its KV pages.

Changes happen between two steps, in the engine thread; what is new is made and checked before.
"""

import threading
from collections.abc import Callable, Collection
from typing import Any

import jax

from jaxengine.core import EngineCore
from jaxengine.errors import RequestError, WeightsError
from jaxengine.models.family import Params
from jaxengine.runtime.runner import Runner
from jaxengine.worker import Worker

TAGS = ("weights", "kv_cache")
"""What `release_memory` can give back."""


class Residency:
    """Swaps weights and gives memory back. One change at a time; calls are safe from any thread."""

    def __init__(self, worker: Worker, core: EngineCore, runner: Runner, version: str) -> None:
        """Starts with everything there.

        Args:
          worker: Whose thread changes are made in.
          core: Sleeps while something is away.
          runner: Has the arrays.
          version: Name of the weights it has.
        """
        self._worker, self._core, self._runner = worker, core, runner
        self._lock = threading.Lock()
        self._away: set[str] = set()
        self._backup: Any = None
        self.versions = [version]

    @property
    def version(self) -> str:
        """Name of the weights that are there."""
        return self.versions[-1]

    def update(self, make: Callable[[Params | None], Params], version: str, running: str) -> None:
        """Puts other weights in the place of these.

        Args:
          make: Checks and places the new ones, given these (None while they are released); called
            here, and what it raises changes nothing.
          version: Name of the new ones.
          running: "finish": requests under way end with the old ones, later ones wait; while
            paused there is nothing to wait for. "keep": those under way go on with the new ones
            from the next step, over the keys and values they have.
        """
        if running not in ("finish", "keep"):
            raise RequestError(f'`running` must be "finish" or "keep", got {running!r}.')
        with self._lock:
            params = make(self._runner.params)

            def swap() -> None:
                self.versions.append(version)
                self._runner.swap(params, len(self.versions) - 1)
                self._core.scheduler.flush_cache()
                self._backup = None
                self._bring_back("weights")

            is_due = (lambda: self._core.is_settled) if running == "finish" else None
            self._worker.call(swap, is_due).result()

    def release(self, tags: Collection[str] | None, *, keep_copy: bool) -> dict[str, Any]:
        """Gives device memory back, once nobody runs; requests that come wait for `resume`.

        Returns:
          Bytes of every tag that went, and those the allocator says are in use, before and after.
        """
        tags = _checked(tags)
        device = self._runner.device
        before = (device.memory_stats() or {}).get("bytes_in_use")
        sizes: dict[str, Any] = {}

        def release() -> None:
            if self._core.scheduler.num_running:
                raise RequestError(
                    "Requests that are paused in place hold pages; call `pause` with "
                    'mode="retract" first, or `resume`.'
                )
            if "kv_cache" in tags and self._core.scheduler.is_bound_to_device:
                raise RequestError(
                    "The samplers of requests that wait have a state that would be lost with the "
                    "pages; `resume` and let them end first, or `abort` them."
                )
            self._core.sleep()
            for tag in tags - self._away:
                sizes[tag] = self._runner.num_bytes(tag)
            if "kv_cache" in sizes:
                self._core.scheduler.forget_device()
                self._runner.release_state()
            if "weights" in sizes:
                self._backup = jax.device_get(self._runner.params) if keep_copy else None
                self._runner.release_params()
            self._away |= tags

        with self._lock:
            self._worker.call(release, lambda: self._core.is_settled).result()
        after = (device.memory_stats() or {}).get("bytes_in_use")
        return {**sizes, "bytes_in_use_before": before, "bytes_in_use": after}

    def resume(self, tags: Collection[str] | None, place: Callable[[Any], Params]) -> None:
        """Brings back what was released; when all of it is there, requests go on.

        Args:
          tags: What of it; None for all.
          place: Puts the copy of the weights on the device.

        Raises:
          WeightsError: If the weights were released without a copy.
        """
        tags = _checked(tags)

        def resume() -> None:
            if "weights" in tags & self._away:
                if self._backup is None:
                    raise WeightsError(
                        "The weights were released with keep_copy=False; call `update_weights`."
                    )
                self._runner.swap(place(self._backup), len(self.versions) - 1)
                self._backup = None
            if "kv_cache" in tags & self._away:
                self._runner.reset()
            for tag in tags:
                self._bring_back(tag)

        with self._lock:
            self._worker.call(resume).result()

    def _bring_back(self, tag: str) -> None:
        self._away.discard(tag)
        if not self._away:
            self._core.wake()


def _checked(tags: Collection[str] | None) -> set[str]:
    """The tags; SGLang's name of what does not exist here is fine, too."""
    wanted: set[str] = set(TAGS) if not tags else {tags} if isinstance(tags, str) else set(tags)
    unknown = wanted - {*TAGS, "cuda_graph"}
    if unknown:
        raise RequestError(f"`tags` must be among {', '.join(TAGS)}, got {sorted(unknown)}.")
    return {tag for tag in TAGS if tag in wanted}
