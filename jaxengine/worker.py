"""The engine's two threads: one steps the core, one turns tokens into outputs.

Neither knows the Engine, so an Engine that nobody holds can be collected, and stops them.
"""

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from jaxengine.core import EngineCore
from jaxengine.errors import EngineDeadError
from jaxengine.log import logger
from jaxengine.types import SequenceRequest, SequenceUpdate

type Command = Callable[[], object]


class Output(Protocol):
    """Takes a sequence's updates in the text thread and gives its outputs to the caller."""

    def push(self, update: SequenceUpdate) -> bool:
        """Takes an update; False ends the sequence now (a stop string was found)."""
        ...


class Worker:
    """Runs an EngineCore in a daemon thread; commands come through an inbox."""

    def __init__(self, core: EngineCore, on_stop: Callable[[], None]) -> None:
        self._core = core
        self._on_stop = on_stop
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._updates: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # Callers' threads put one in, the text thread takes it out.
        self._outputs: dict[int, Output] = {}
        self._calls: set[Future] = set()
        # Calls that are not due yet, and what must not overtake them.
        self._waiting: deque[tuple[Callable[[], bool], Command]] = deque()
        self._held: list[Command] = []
        self._is_stopping = False
        self.is_dead = False
        # Held while `is_dead` changes, and while outputs and calls are registered before that.
        self._ending = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run_engine, name="jaxengine-engine", daemon=True),
            threading.Thread(target=self._run_text, name="jaxengine-text", daemon=True),
        ]
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    def submit(self, requests: list[tuple[SequenceRequest, Output]]) -> None:
        """Queues sequences, all at once.

        Raises:
          EngineDeadError: After `stop`.
        """

        def add() -> None:
            for request, _ in requests:
                self._core.add(request)

        with self._ending:
            self._check_alive()
            # First of all, so that a request the engine never sees still learns of its end.
            self._outputs.update((request.seq_id, output) for request, output in requests)
            self._inbox.put(lambda: self._held.append(add) if self._waiting else add())

    def finish(self, update: SequenceUpdate) -> None:
        """Ends a sequence at the next window end, with this as its last update."""

        def finish() -> None:
            if self._core.finish(update.seq_id):
                self._updates.put([update])
            elif self._held:
                self._held.append(finish)  # it may be among those that wait to be added

        self._inbox.put(finish)

    def call(self, function: Callable[[], Any], is_due: Callable[[], bool] | None = None) -> Future:
        """Runs a function between two steps, in the engine thread.

        Args:
          function: What to run.
          is_due: Asked after every step whether it may run now; sequences that are submitted
            meanwhile wait for it.

        Raises:
          EngineDeadError: After `stop`; one that was not run before it gets it from the future.
        """
        future: Future = Future()
        future.add_done_callback(self._calls.discard)

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._ending:
            self._check_alive()
            self._calls.add(future)
            self._inbox.put(run if is_due is None else lambda: self._waiting.append((is_due, run)))
        return future

    def pause(self, *, keeps_pages: bool) -> None:
        """Waits until nothing is under way; see `EngineCore.pause`."""
        self.call(lambda: self._updates.put(self._core.pause(keeps_pages=keeps_pages))).result()

    def close(self) -> None:
        """Takes no more requests, and lets no more steps begin."""
        self._is_stopping = True
        self._inbox.put(None)

    def stop(self, timeout_s: float) -> None:
        """Ends both threads; unfinished requests fail with EngineDeadError. Idempotent."""
        self.close()
        # The garbage collector may run this in one of them; each waits for the other at its end.
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join(timeout_s)

    def _check_alive(self) -> None:
        if self.is_dead or self._is_stopping:
            raise EngineDeadError("The engine was shut down; make a new one.")

    def _run_engine(self) -> None:
        cause: BaseException | None = None
        try:
            while self._drain_inbox():
                updates = self._core.step()
                # A step that failed because programs were stopped is no news to its requests.
                if updates and not self._is_stopping:
                    self._updates.put(updates)
        except BaseException as error:
            cause = error
            logger.exception("the engine thread died")
        with self._ending:
            self.is_dead = True
            message = f"The engine stopped: {cause or 'it was shut down'}."
            self._updates.put(EngineDeadError(message))
            for call in list(self._calls):
                call.set_exception(EngineDeadError(message))
        # A step that ended after the interpreter did would abort the process.
        self._core.drain()
        self._on_stop()

    def _drain_inbox(self) -> bool:
        """Runs waiting commands; blocks while there is nothing else to do. False to stop."""
        while True:
            self._run_due()
            with contextlib.suppress(queue.Empty):
                is_idle = not self._core.has_work
                # Deadlines pass while the engine is paused, too.
                command = self._inbox.get(is_idle, self._core.seconds_to_deadline)
                if command is None or self._is_stopping:
                    return False
                command()
                continue
            return True

    def _run_due(self) -> None:
        while self._waiting and self._waiting[0][0]():
            self._waiting.popleft()[1]()
        if not self._waiting and self._held:
            held, self._held = self._held, []
            for command in held:
                command()

    def _run_text(self) -> None:
        while True:
            message = self._updates.get()
            if isinstance(message, EngineDeadError):
                for seq_id, output in list(self._outputs.items()):
                    output.push(SequenceUpdate(seq_id, [], error=message))
                return
            started = time.perf_counter()
            for update in message:
                self._deliver(update)
            self._core.seconds["text"] += time.perf_counter() - started

    def _deliver(self, update: SequenceUpdate) -> None:
        output = self._outputs.get(update.seq_id)
        if output is None:
            return
        try:
            goes_on = output.push(update)
        except Exception as error:
            logger.exception("detokenizing failed")
            goes_on = False
            output.push(SequenceUpdate(update.seq_id, [], error=error))
        if update.finish or update.error or not goes_on:
            del self._outputs[update.seq_id]
            if not (update.finish or update.error):
                self._inbox.put(lambda: self._core.finish(update.seq_id))
