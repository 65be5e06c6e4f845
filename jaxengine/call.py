"""One `generate` call under way: what its caller iterates over or waits for."""

from collections.abc import Callable
from typing import Any

from jaxengine.channel import Channel
from jaxengine.types import SequenceRequest

type Output = dict[str, Any]


class Call:
    """One `generate` call under way: an iterator of outputs, sync and async.

    Dropping or closing it before its end aborts what still runs.
    """

    def __init__(
        self,
        channel: Channel,
        samples: list[SequenceRequest],
        *,
        is_single: bool,
        abort: Callable[[list[SequenceRequest]], None],
        release: Callable[[list[SequenceRequest]], None],
    ) -> None:
        """Starts reading.

        Args:
          channel: Brings `(index, output or exception, is_last)`.
          samples: What was submitted, in the order of the indices.
          is_single: The result is one dict, not a list.
          abort: Ends samples early.
          release: Is told when nothing of the call runs any more.
        """
        self._abort = abort
        self._release = release
        self._channel = channel
        self._samples = samples
        self._running = dict(enumerate(samples))
        self._is_single = is_single

    @property
    def num_samples(self) -> int:
        """How many final outputs it brings."""
        return len(self._samples)

    @property
    def is_complete(self) -> bool:
        """Whether `collect` of a call that is not streamed would not wait."""
        return len(self._channel) >= len(self._samples)

    def watch(self, on_output: Callable[[], object]) -> None:
        """Has a function called, in any thread, for every output: it must not wait."""
        self._channel.watch(on_output)

    def collect(self, on_output: Callable[[Output], object] | None = None) -> Any:
        """Waits for every sample's final output; `on_output` sees each as it comes."""
        items = []
        try:
            for _ in self._samples:
                items.append(self._take(self._channel.get()))
                if on_output is not None:
                    on_output(items[-1][1])
            return self._arrange(items)
        finally:
            self.close()

    async def acollect(self) -> Output | list[Output]:
        """Awaits every sample's final output."""
        try:
            return self._arrange([self._take(await self._channel.aget()) for _ in self._samples])
        finally:
            self.close()

    def close(self) -> None:
        """Aborts what still runs."""
        left, self._running = list(self._running.values()), {}
        if left:
            self._abort(left)
        self._release(self._samples)

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self.close()

    def __iter__(self) -> "Call":
        return self

    def __next__(self) -> Output:
        if not self._running:
            raise StopIteration
        try:
            return self._label(self._take(self._channel.get()))
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Output:
        if not self._running:
            raise StopAsyncIteration
        try:
            return self._label(self._take(await self._channel.aget()))
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        if self._running:
            self.close()

    def _take(self, item: tuple[int, Output | Exception, bool]) -> tuple[int, Output]:
        index, output, is_last = item
        if is_last:
            self._running.pop(index, None)
            if not self._running:
                self._release(self._samples)
        if isinstance(output, Exception):
            raise output
        return index, output

    def _label(self, item: tuple[int, Output]) -> Output:
        index, output = item
        if not self._is_single:
            output["index"] = index
        return output

    def _arrange(self, items: list[tuple[int, Output]]) -> Output | list[Output]:
        ordered = [output for _, output in sorted(items, key=lambda item: item[0])]
        return ordered[0] if self._is_single else ordered
