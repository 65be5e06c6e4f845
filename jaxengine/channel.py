"""How outputs reach a caller: from one writer thread to a reader in any thread or event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


class Channel:
    """A queue with one reader, which may block or await. The writer never waits."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._condition = threading.Condition()
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future] | None = None
        self._on_put: Callable[[], object] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def watch(self, on_put: Callable[[], object]) -> None:
        """Has a function called for every item, those already here included.

        It is called in the writer's thread, or in this one, and must not wait.
        """
        with self._condition:
            self._on_put = on_put
            num_here = len(self._items)
        for _ in range(num_here):
            on_put()

    def put(self, item: Any) -> None:
        """Adds an item and wakes the reader."""
        with self._condition:
            self._items.append(item)
            self._condition.notify()
            waiter, self._waiter = self._waiter, None
            on_put = self._on_put
        if on_put is not None:
            on_put()
        if waiter is not None:
            loop, future = waiter
            try:
                loop.call_soon_threadsafe(_wake, future)
            except RuntimeError:  # the reader's loop was closed; nobody reads any more
                pass

    def get(self) -> Any:
        """The next item; blocks. Ctrl-C interrupts it."""
        with self._condition:
            while not self._items:
                self._condition.wait()
            return self._items.popleft()

    async def aget(self) -> Any:
        """The next item; awaits, in whatever loop it is called from."""
        while True:
            loop = asyncio.get_running_loop()
            with self._condition:
                if self._items:
                    return self._items.popleft()
                future = loop.create_future()
                self._waiter = (loop, future)
            await future


def _wake(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)
