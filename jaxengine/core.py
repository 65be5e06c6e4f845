"""EngineCore: the step `plan n+1 -> dispatch n+1 -> read n -> commit n`. Knows tokens, not text."""

import time
from collections import deque
from typing import Any, Protocol

from jaxengine.errors import StepError
from jaxengine.log import logger
from jaxengine.scheduler.plan import StepPlan, StepResult
from jaxengine.scheduler.scheduler import Scheduler
from jaxengine.types import SequenceRequest, SequenceUpdate


class Handle(Protocol):
    """A step under way."""

    plan: StepPlan

    def result(self) -> StepResult:
        """Waits for the device."""
        ...


class StepRunner(Protocol):
    """What the core needs of the runtime; tests put a fake here."""

    def dispatch(self, plan: StepPlan) -> Handle:
        """Starts a step and returns before it has run."""
        ...

    def reset(self) -> None:
        """Makes the device state anew."""
        ...


class EngineCore:
    """Scheduler and runner, one step ahead of each other. Owned by a single thread."""

    def __init__(self, scheduler: Scheduler, runner: StepRunner) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._in_flight: deque[Handle] = deque()
        self.seconds = {"schedule": 0.0, "dispatch": 0.0, "wait": 0.0}
        self.num_reads = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or bool(self._in_flight)

    def add(self, request: SequenceRequest) -> None:
        """Queues a sequence."""
        self.scheduler.add(request)

    def finish(self, seq_id: int) -> bool:
        """Ends a sequence early; False if it had ended. Tokens in flight are dropped."""
        return self.scheduler.finish(seq_id) is not None

    def step(self) -> list[SequenceUpdate]:
        """Dispatches the next step, then takes in the one before it.

        A failed step fails its own sequences; the device state is rebuilt and all others are
        computed anew.
        """
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        self._spend("schedule", started)
        if plan is not None:
            started = time.perf_counter()
            try:
                self._in_flight.append(self._runner.dispatch(plan))
            except Exception as error:
                return self._recover(plan, error)
            finally:
                self._spend("dispatch", started)
            if len(self._in_flight) == 1:
                return []
        return self._read() if self._in_flight else []

    def drain(self) -> None:
        """Waits for the steps in flight and drops what they bring."""
        while self._in_flight:
            try:
                self._in_flight.popleft().result()
            except Exception as error:
                logger.debug("a step in flight at the end failed: %s", error)

    def _read(self) -> list[SequenceUpdate]:
        handle = self._in_flight.popleft()
        started = time.perf_counter()
        try:
            result = handle.result()
        except Exception as error:
            return self._recover(handle.plan, error)
        finally:
            self._spend("wait", started)
        self.num_reads += 1
        started = time.perf_counter()
        updates = self.scheduler.commit(handle.plan, result)
        self._spend("schedule", started)
        return updates

    def _recover(self, plan: StepPlan, cause: Exception) -> list[SequenceUpdate]:
        logger.error("a %s failed and is recovered from: %s", type(plan).__name__, cause)
        self._in_flight.clear()
        error = StepError(
            f"The device step of this request failed ({type(cause).__name__}: {cause}). "
            f"{len(plan.rows)} sequences were in it; {self.scheduler.num_free_pages} KV pages "
            f"were free. The others go on; submit this one again."
        )
        error.__cause__ = cause
        updates = self.scheduler.recover(plan, error)
        self._runner.reset()
        return updates

    def _spend(self, what: str, started: float) -> None:
        self.seconds[what] += time.perf_counter() - started

    def stats(self) -> dict[str, Any]:
        """Counts and times since the start."""
        scheduler, counts = self.scheduler, vars(self.scheduler.stats).copy()
        windows = max(1, counts["num_windows"])
        return {
            **counts,
            "num_waiting": scheduler.num_waiting,
            "num_running": scheduler.num_running,
            "num_free_pages": scheduler.num_free_pages,
            "num_host_reads": self.num_reads,
            "mean_window_steps": counts["num_window_steps"] / windows,
            "seconds": dict(self.seconds),
        }
