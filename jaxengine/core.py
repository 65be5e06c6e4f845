"""EngineCore: the step `plan n+1 -> dispatch n+1 -> read n -> commit n`. Knows tokens, not text."""

import heapq
import time
from collections import deque
from typing import Any, Protocol

from jaxengine.errors import StepError
from jaxengine.log import logger
from jaxengine.scheduler.plan import StepPlan, StepResult
from jaxengine.scheduler.scheduler import Scheduler
from jaxengine.types import SequenceRequest, SequenceUpdate, StopReason


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

    def __init__(self, scheduler: Scheduler, runner: StepRunner, page_bytes: int = 0) -> None:
        """Starts idle.

        Args:
          scheduler: Plans.
          runner: Runs.
          page_bytes: Size of a KV page, for messages.
        """
        self.scheduler = scheduler
        self._runner = runner
        self._page_bytes = page_bytes
        self._in_flight: deque[Handle] = deque()
        self._deadlines: list[tuple[float, int, float]] = []
        self._is_paused = False
        self._is_asleep = False
        self._has_device_state = True
        self.seconds = {"schedule": 0.0, "dispatch": 0.0, "wait": 0.0, "text": 0.0}
        self.num_reads = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything, deadlines apart."""
        is_stopped = self._is_paused or self._is_asleep
        return bool(self._in_flight) or (self.scheduler.has_work and not is_stopped)

    @property
    def is_settled(self) -> bool:
        """Nothing is under way, and nobody unfinished goes on before `resume`."""
        is_stopped = self._is_paused or self._is_asleep
        return not self._in_flight and (is_stopped or not self.scheduler.has_work)

    @property
    def seconds_to_deadline(self) -> float | None:
        """Time until a step has a request to end for its `timeout_s`; None where there is none."""
        if not self._deadlines:
            return None
        return max(0.0, self._deadlines[0][0] - time.monotonic())

    def add(self, request: SequenceRequest) -> None:
        """Queues a sequence."""
        self.scheduler.add(request)
        if request.timeout_s is not None:
            deadline = time.monotonic() + request.timeout_s
            heapq.heappush(self._deadlines, (deadline, request.seq_id, request.timeout_s))

    def finish(self, seq_id: int) -> bool:
        """Ends a sequence early; False if it had ended. Tokens in flight are dropped."""
        return self.scheduler.finish(seq_id) is not None

    def abort(self, seq_id: int, message: str | None = None) -> list[SequenceUpdate]:
        """Ends a sequence with a last update that says so; none if it had ended."""
        sequence = self.scheduler.finish(seq_id)
        if sequence is None:
            return []
        return [sequence.last_update(finish=StopReason("abort", message=message))]

    def step(self) -> list[SequenceUpdate]:
        """Dispatches the next step, then takes in the one before it.

        A failed step fails its own sequences; the device state is rebuilt and all others are
        computed anew.
        """
        updates = self._expire()
        if self.scheduler.has_work and not self._has_device_state:
            updates += self._reset()
        plan = self._schedule()
        if plan is not None:
            started = time.perf_counter()
            try:
                self._in_flight.append(self._runner.dispatch(plan))
            except Exception as error:
                return updates + self._recover(plan, error)
            finally:
                self._spend("dispatch", started)
            if len(self._in_flight) == 1:
                return updates
        return updates + self._read() if self._in_flight else updates

    def pause(self, *, keeps_pages: bool) -> list[SequenceUpdate]:
        """Reads what is under way and starts nothing more before `resume`.

        Args:
          keeps_pages: Those who run stay where they are; else they wait again, in their order.
        """
        self._is_paused = True
        updates = []
        while self._in_flight:
            updates += self._read()
        if not keeps_pages:
            self.scheduler.preempt_all()
        return updates

    def resume(self) -> None:
        """Goes on after a pause."""
        self._is_paused = False

    def sleep(self) -> None:
        """Starts nothing before `wake`; only when settled."""
        self._is_asleep = True

    def wake(self) -> None:
        """Goes on after `sleep`."""
        self._is_asleep = False

    def drain(self) -> None:
        """Waits for the steps in flight and drops what they bring."""
        while self._in_flight:
            try:
                self._in_flight.popleft().result()
            except Exception as error:
                logger.debug("a step in flight at the end failed: %s", error)

    def _schedule(self) -> StepPlan | None:
        if self._is_paused or self._is_asleep:
            return None
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        self._spend("schedule", started)
        return plan

    def _expire(self) -> list[SequenceUpdate]:
        """Ends the requests whose time is over."""
        updates = []
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, seq_id, timeout_s = heapq.heappop(self._deadlines)
            updates += self.abort(seq_id, f"Timed out: `timeout_s` is {timeout_s:g}.")
        return updates

    def _read(self) -> list[SequenceUpdate]:
        handle = self._in_flight.popleft()
        started = time.perf_counter()
        try:
            result = handle.result()
        except Exception as error:
            # Later steps worked on what this one left; they tell nothing.
            self._in_flight.clear()
            return self._recover(handle.plan, error)
        finally:
            self._spend("wait", started)
        self.num_reads += 1
        started = time.perf_counter()
        updates = self.scheduler.commit(handle.plan, result)
        self._spend("schedule", started)
        return updates

    def _recover(self, plan: StepPlan, cause: Exception) -> list[SequenceUpdate]:
        """Reads what ran before the failure, fails the step's sequences, and begins anew."""
        logger.error("a %s failed and is recovered from: %s", type(plan).__name__, cause)
        failed, updates = [plan], []
        while self._in_flight:
            handle = self._in_flight.popleft()
            try:
                updates += self.scheduler.commit(handle.plan, handle.result())
            except Exception as error:
                logger.error("so did the %s before it: %s", type(handle.plan).__name__, error)
                failed.append(handle.plan)
        updates += self.scheduler.recover(failed, self._step_error(plan, cause))
        return updates + self._reset()

    def _reset(self) -> list[SequenceUpdate]:
        """Makes the device state anew. Where that fails so does everyone, and the next request
        has it tried again."""
        try:
            self._runner.reset()
        except Exception as cause:
            logger.error("the device state could not be made anew: %s", cause)
            self._has_device_state = False
            total = self.scheduler.num_pages
            error = StepError(
                f"The device state could not be made anew after a failed step "
                f"({type(cause).__name__}: {cause}). It needs {self._in_bytes(total)} for KV "
                "pages. Free device memory, and submit this request again."
            )
            error.__cause__ = cause
            return self.scheduler.fail_all(error)
        self._has_device_state = True
        return []

    def _step_error(self, plan: StepPlan, cause: Exception) -> StepError:
        scheduler = self.scheduler
        error = StepError(
            f"The device step of this request failed ({type(cause).__name__}: {cause}). "
            f"{len(plan.rows)} sequences were in it; {self._in_bytes(scheduler.num_free_pages)} of "
            f"{self._in_bytes(scheduler.num_pages)} were free. The others go on; submit this one "
            "again."
        )
        error.__cause__ = cause
        return error

    def _in_bytes(self, num_pages: int) -> str:
        return f"{num_pages:,} KV pages ({num_pages * self._page_bytes / 1e6:,.1f} MB)"

    def _spend(self, what: str, started: float) -> None:
        self.seconds[what] += time.perf_counter() - started

    def stats(self) -> dict[str, Any]:
        """Counts, shares and times since the start."""
        scheduler, counts = self.scheduler, self.scheduler.stats

        def share(part: int, whole: int) -> float:
            return part / max(1, whole)

        busy_s = max(1e-9, sum(self.seconds[name] for name in ("schedule", "dispatch", "wait")))
        prefill_places = counts.num_prefill_tokens + counts.num_prefill_padding
        decode_places = counts.num_decode_rows + counts.num_decode_padding
        return {
            **vars(counts),
            "window_sizes": dict(counts.window_sizes),
            "num_waiting": scheduler.num_waiting,
            "num_running": scheduler.num_running,
            "num_pages": scheduler.num_pages,
            "num_free_pages": scheduler.num_free_pages,
            "num_cached_pages": scheduler.num_cached_pages,
            "num_host_reads": self.num_reads,
            "mean_window_steps": share(counts.num_window_steps, counts.num_windows),
            "masked_row_waste": share(counts.num_masked_row_steps, counts.num_row_steps),
            "decode_padding_waste": share(counts.num_decode_padding, decode_places),
            "prefill_padding_waste": share(counts.num_prefill_padding, prefill_places),
            "cache_hit_rate": share(counts.num_cached_tokens, counts.num_prompt_tokens),
            "prompt_tokens_per_s": counts.num_prompt_tokens / busy_s,
            "generated_tokens_per_s": counts.num_generated_tokens / busy_s,
            "seconds": dict(self.seconds),
        }
