"""A stream of prompts through an engine, a bounded number in flight. Knows calls, not engines."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxengine.call import Call
from jaxengine.channel import Channel
from jaxengine.errors import EngineDeadError, RequestError

REORDER_FACTOR = 8
"""Results that wait for an earlier one are at most this many times those in flight."""

type Start = Callable[[Any, int], Call]
"""Starts an item's call; the number is its place."""


class Flow(NamedTuple):
    """How results flow.

    Attributes:
      max_in_flight: Most calls that run or wait at once.
      is_ordered: Give bare results in the order of the items, else `(place, result)` as they end.
      returns_errors: An item that fails gives its exception as its result.
    """

    max_in_flight: int
    is_ordered: bool
    returns_errors: bool

    @classmethod
    def of(cls, max_in_flight: int, *, ordered: bool, on_error: str) -> "Flow":
        """Checks the arguments of `Engine.imap`.

        Raises:
          RequestError: For one that is wrong.
        """
        if on_error not in ("raise", "return"):
            raise RequestError(f'`on_error` must be "raise" or "return", got {on_error!r}.')
        if max_in_flight < 1:
            raise RequestError(f"`max_in_flight` must be at least 1, got {max_in_flight}.")
        return cls(max_in_flight, ordered, on_error == "return")


def merged_arguments(common: Mapping[str, Any], item: Any) -> dict[str, Any]:
    """The arguments of an item's call: its own, before those of all items.

    Sampling parameters are merged one by one.

    Raises:
      TypeError: For those of a whole call: an item gives what `generate` does for one, at its end.
    """
    own = arguments_of(item)
    arguments = {**common, **own}
    for name in ("progress", "stream"):
        if arguments.pop(name, False):
            raise TypeError(f"imap() got an unexpected keyword argument `{name}`.")
    of_all, its_own = common.get("sampling_params"), own.get("sampling_params")
    if isinstance(of_all, Mapping) and isinstance(its_own, Mapping):
        arguments["sampling_params"] = {**of_all, **its_own}
    return arguments


def arguments_of(item: Any) -> dict[str, Any]:
    """The arguments of `generate` that an item stands for: a text, token ids, or a dict of them.

    Raises:
      RequestError: For anything else; the item itself where it is one, so that a source can report
        what it could not read, in its place.
    """
    if isinstance(item, RequestError):
        raise item
    if isinstance(item, str):
        return {"prompt": item}
    if isinstance(item, Mapping):
        return dict(item)
    if isinstance(item, list | tuple | np.ndarray):
        return {"input_ids": item}
    raise RequestError(
        f"An item must be a text, a list of token ids, or a dict of arguments of `generate`, got "
        f"{type(item).__name__}."
    )


def item_start(start: Callable[[dict[str, Any], Any], Call], common: Mapping[str, Any]) -> Start:
    """How items are started.

    Args:
      start: Starts a call of these arguments, its seed derived from this key.
      common: Arguments of all items.
    """

    def start_item(item: Any, place: int) -> Call:
        arguments = merged_arguments(common, item)
        key = arguments.pop("seed_key", place)
        return start(arguments, key)

    return start_item


def imap(start: Start, items: Any, flow: Flow) -> Iterator[Any]:
    """Results of items as they end or in their order; closing it aborts what still runs.

    Args:
      start: Starts an item's call.
      items: Any iterable; an item is taken when there is room for it.
      flow: How many at once, and what is given.
    """
    flight = _Flight(start, flow)
    source = iter(items)
    is_over = False
    try:
        while True:
            while not is_over and flight.has_room:
                try:
                    flight.add(next(source))
                except StopIteration:
                    is_over = True
            if flight.has_due:
                yield flight.pop()
            elif flight.num_running:
                flight.take(flight.ended.get())
            else:
                return
    finally:
        flight.close()


async def aimap(start: Start, items: Any, flow: Flow) -> AsyncIterator[Any]:
    """`imap` for coroutines; `items` may be an async iterable, too.

    Items are taken by a task of their own, so a slow source holds no result back.
    """
    flight = _Flight(start, flow)
    room = asyncio.Event()

    async def feed() -> None:
        try:
            async with contextlib.aclosing(_each(items)) as source:
                async for item in source:
                    while not flight.has_room:
                        room.clear()
                        await room.wait()
                    flight.add(item)
            flight.ended.put(None)
        except Exception as error:
            flight.ended.put(error)

    feeder = asyncio.create_task(feed())
    is_over = False
    try:
        while not is_over or flight.num_running or flight.has_due:
            if flight.has_due:
                result = flight.pop()
                room.set()
                yield result
            else:
                place = await flight.ended.aget()
                if isinstance(place, Exception):
                    raise place
                is_over = is_over or place is None
                if place is not None:
                    flight.take(place)
                room.set()
    finally:
        feeder.cancel()
        flight.close()


async def _each(items: Any) -> AsyncGenerator[Any]:
    if hasattr(items, "__aiter__"):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class _Flight:
    """Calls under way and results not yet given out.

    `ended` brings the place of a call whenever a sample of it ended.
    """

    def __init__(self, start: Start, flow: Flow) -> None:
        self.ended = Channel()
        self._start = start
        self._flow = flow
        self._running: dict[int, Call] = {}
        self._results: dict[int, Any] = {}
        self._num_added = 0
        self._num_given = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_due(self) -> bool:
        """Whether `pop` has something to give."""
        return self._num_given in self._results if self._flow.is_ordered else bool(self._results)

    @property
    def has_room(self) -> bool:
        """Whether another item may be taken."""
        most = self._flow.max_in_flight
        is_held_up = len(self._results) >= REORDER_FACTOR * most
        return len(self._running) < most and not is_held_up

    def add(self, item: Any) -> None:
        """Starts the next item."""
        place, self._num_added = self._num_added, self._num_added + 1
        try:
            call = self._running[place] = self._start(item, place)
        except EngineDeadError:
            raise
        except Exception as error:
            self._fail(place, error)
            return
        call.watch(lambda: self.ended.put(place))

    def take(self, place: int) -> None:
        """Notes that a sample ended; when all of the call's have, its result is there."""
        call = self._running.get(place)
        if call is None or not call.is_complete:
            return
        del self._running[place]
        try:
            self._results[place] = call.collect()
        except EngineDeadError:
            raise
        except Exception as error:
            self._fail(place, error)

    def pop(self) -> Any:
        """Gives what is due."""
        place = self._num_given if self._flow.is_ordered else next(iter(self._results))
        self._num_given += 1
        result = self._results.pop(place)
        return result if self._flow.is_ordered else (place, result)

    def close(self) -> None:
        """Aborts what still runs."""
        for call in self._running.values():
            call.close()
        self._running.clear()

    def _fail(self, place: int, error: Exception) -> None:
        if not self._flow.returns_errors:
            error.add_note(f"It was item {place} of the iterator.")
            raise error
        self._results[place] = error
