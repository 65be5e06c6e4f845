"""Compiles every step ahead, in parallel, in daemon threads."""

import atexit
import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from jaxengine.errors import EngineDeadError
from jaxengine.log import logger
from jaxengine.runtime.executables import ExecutableCache, ProgramSpec
from jaxengine.runtime.heap import Heap


class ProgramKey(NamedTuple):
    """Which program.

    Attributes:
      kind: "prefill", "decode", ...
      size: Its bucket of tokens or rows; 0 where there is only one.
      owner: Which `SamplerSteps` it belongs to; 0 is the engine's own, and those of none.
    """

    kind: str
    size: int = 0
    owner: int = 0


STOP_TIMEOUT_S = 60.0
"""Longest wait for a compilation under way; it cannot be interrupted."""

URGENT, FIRST, LATER, IDLE = -1, 0, 1, 2
"""Ranks: someone waits for it, a first answer needs it, the others, what may never be needed."""


class Programs:
    """All compiled steps of an engine, by key. Compiling happens in daemon threads of its own."""

    def __init__(
        self,
        specs: Mapping[ProgramKey, ProgramSpec],
        *,
        first: Collection[ProgramKey],
        cache: ExecutableCache | None,
        progress: bool,
    ) -> None:
        """Starts compiling.

        Args:
          specs: What to compile.
          first: Keys a first answer needs; see `wait`.
          cache: Where executables are kept, if at all.
          progress: Show a bar.
        """
        self._first = tuple(first)
        self._initial = tuple(specs)
        # Specs hold a sampler's functions, so they are kept no longer than until they are built.
        self._specs: dict[ProgramKey, ProgramSpec] = {}
        self._cache = cache
        self._done: dict[ProgramKey, Future] = {}
        self._queue: queue.PriorityQueue = queue.PriorityQueue()
        self._tickets = itertools.count()
        self._lock = threading.Lock()
        self._num_building = 0
        self._tracing = threading.Lock()
        self._stopped = False
        self.num_compiled = 0
        self.num_loaded = 0
        self.seconds = 0.0
        self._spent = {"load": 0.0, "trace": 0.0, "compile": 0.0}
        self._started = time.perf_counter()
        self._num_left = len(specs)
        self._bar = tqdm(total=len(specs), desc="Compiling", unit="program", disable=not progress)
        self.add({key: specs[key] for key in first}, FIRST)
        self.add(specs, LATER)
        workers = min(8, os.cpu_count() or 1)
        self._threads = [
            threading.Thread(target=self._work, name=f"jaxengine-compile-{i}", daemon=True)
            for i in range(workers)
        ]
        self._heap = Heap()
        # Compiling while the interpreter ends would crash it; jax's own hook then runs after this.
        atexit.register(self.stop)
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.stop()
            raise

    def add(self, specs: Mapping[ProgramKey, ProgramSpec], rank: int) -> None:
        """Compiles more programs; those that are there already are left alone."""
        with self._lock:
            new = {key: spec for key, spec in specs.items() if key not in self._done}
            self._specs |= new
            self._done |= {key: Future() for key in new}
        for key, spec in new.items():
            # Of one rank the largest come first, which take longest.
            self._put(rank - spec.cost / (1 + spec.cost), key)

    def drop(self, owner: int) -> None:
        """Forgets the programs of one owner; nobody may ask for them any more."""
        with self._lock:
            for key in [key for key in self._done if key.owner == owner]:
                del self._done[key]
                self._specs.pop(key, None)

    def get(self, key: ProgramKey) -> Any:
        """The executable; waits while it is being compiled.

        Raises:
          Exception: Whatever compiling it raised.
        """
        future = self._done[key]
        if not future.done():
            self._put(URGENT, key)
        return future.result()

    def stats(self) -> dict[str, float]:
        """How many programs there are, where they came from, and what they took.

        `seconds` is from the start until the initial ones were ready; `load_seconds`,
        `trace_seconds` and `compile_seconds` are of all threads together.
        """
        with self._lock:
            spent = {f"{what}_seconds": seconds for what, seconds in self._spent.items()}
        return {
            "num_programs": len(self._done),
            "num_compiled": self.num_compiled,
            "num_loaded": self.num_loaded,
            "seconds": self.seconds,
            **spent,
        }

    def __contains__(self, key: ProgramKey) -> bool:
        return key in self._done

    def is_ready(self, key: ProgramKey) -> bool:
        """Whether `get` would give the executable at once."""
        future = self._done.get(key)
        return future is not None and future.done() and future.exception() is None

    def wait_first(self) -> None:
        """Waits for the programs a first answer needs."""
        for key in self._first:
            self.get(key)

    def wait(self, *, background: bool) -> None:
        """Waits for the programs the engine began with.

        Args:
          background: And for all that were added since.
        """
        for key in self._initial:
            self.get(key)
        if background:
            with self._lock:
                futures = list(self._done.values())
            for future in futures:
                future.exception()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Lets running compilations end and starts no more."""
        self._stopped = True
        error = EngineDeadError("The engine was shut down before this program was compiled.")
        for _ in self._threads:
            self._put(2 * URGENT, None)
        # The garbage collector may run this in one of them.
        for thread in set(self._threads) - {threading.current_thread()}:
            if thread.ident is not None:
                thread.join(timeout_s)
        atexit.unregister(self.stop)
        self._bar.close()
        with self._lock:
            for future in self._done.values():
                if not future.done():
                    future.set_exception(error)
        self._heap.close()

    def _put(self, rank: float, key: ProgramKey | None) -> None:
        self._queue.put((rank, next(self._tickets), key))

    def _work(self) -> None:
        while not self._stopped:
            _, _, key = self._queue.get()
            if key is None or self._stopped:
                break
            with self._lock:
                spec, future = self._specs.pop(key, None), self._done.get(key)
                if spec is None or future is None:
                    continue
                self._num_building += 1
            self._build(key, spec, future)
            del spec  # it holds a sampler's functions

    def _build(self, key: ProgramKey, spec: ProgramSpec, future: Future) -> None:
        cache = self._cache if spec.is_cached else None
        try:
            with self._clock("load"):
                program = cache.load(spec) if cache else None
            was_loaded = program is not None
            if program is None:
                # Tracing holds the GIL: one at a time leaves the rest of the process its share.
                with self._tracing, self._clock("trace"):
                    lowered = spec.lower()
                with self._clock("compile"):
                    program = lowered.compile(compiler_options=dict(spec.options) or None)
                if cache:
                    cache.store(spec, program)
        except BaseException as error:
            self._end_building()
            future.set_exception(error)
        else:
            with self._lock:
                self.num_loaded += was_loaded
                self.num_compiled += not was_loaded
            self._end_building()
            future.set_result(program)
        if key in self._initial:
            self._report(spec)

    def _end_building(self) -> None:
        """After the last program, and before anyone learns of it, the heap settles."""
        with self._lock:
            self._num_building -= 1
            is_last = not (self._specs or self._num_building)
        if is_last:
            self._heap.settle()

    @contextlib.contextmanager
    def _clock(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        with self._lock:
            self._spent[what] += time.perf_counter() - started

    def _report(self, spec: ProgramSpec) -> None:
        with self._lock:
            self._bar.set_description(f"Compiling {spec.name}")
            self._bar.update()
            self._num_left -= 1
            if self._num_left == 0:
                self._bar.close()
                self.seconds = time.perf_counter() - self._started
                logger.info(
                    "programs ready in %.1f s: %d compiled, %d from the executable cache",
                    self.seconds,
                    self.num_compiled,
                    self.num_loaded,
                )
