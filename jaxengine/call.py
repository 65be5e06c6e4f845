"""One `generate` call under way: what its caller iterates over or waits for."""

from collections.abc import Callable, Mapping
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
        samples: Mapping[int, SequenceRequest],
        *,
        num_outputs: int,
        is_single: bool,
        abort: Callable[[list[SequenceRequest]], None],
        release: Callable[[list[SequenceRequest]], None],
    ) -> None:
        """Starts reading.

        Args:
          channel: Brings `(index, output or exception, is_last)`.
          samples: What was submitted, by index.
          num_outputs: How many there will be; those of no sample are in the channel already.
          is_single: The result is one dict, not a list.
          abort: Ends samples early.
          release: Is told of samples that do not run any more.
        """
        self._abort = abort
        self._release = release
        self._channel = channel
        self._running = dict(samples)
        self._left = set(range(num_outputs))
        self._num_outputs = num_outputs
        self._is_single = is_single

    @property
    def num_samples(self) -> int:
        """How many final outputs it brings."""
        return self._num_outputs

    @property
    def is_complete(self) -> bool:
        """Whether `collect` of a call that is not streamed would not wait."""
        return len(self._channel) >= self._num_outputs

    def watch(self, on_output: Callable[[], object]) -> None:
        """Has a function called, in any thread, for every output: it must not wait."""
        self._channel.watch(on_output)

    def collect(self, on_output: Callable[[Output], object] | None = None) -> Any:
        """Waits for every sample's final output; `on_output` sees each as it comes."""
        items = []
        try:
            for _ in range(self._num_outputs):
                items.append(self._take(self._channel.get()))
                if on_output is not None:
                    on_output(items[-1][1])
            return self._arrange(items)
        finally:
            self.close()

    async def acollect(self, on_output: Callable[[Output], object] | None = None) -> Any:
        """`collect` for coroutines."""
        items = []
        try:
            for _ in range(self._num_outputs):
                items.append(self._take(await self._channel.aget()))
                if on_output is not None:
                    on_output(items[-1][1])
            return self._arrange(items)
        finally:
            self.close()

    def close(self) -> None:
        """Aborts what still runs."""
        self._left = set()
        running, self._running = list(self._running.values()), {}
        if running:
            self._abort(running)
            self._release(running)

    async def aclose(self) -> None:
        """`close`, for `contextlib.aclosing`."""
        self.close()

    def __iter__(self) -> "Call":
        return self

    def __next__(self) -> Output:
        if not self._left:
            raise StopIteration
        try:
            return self._label(self._take(self._channel.get()))
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> Output:
        if not self._left:
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
            self._left.discard(index)
            sample = self._running.pop(index, None)
            if sample is not None:
                self._release([sample])
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
