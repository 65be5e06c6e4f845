"""One writer thread, one reader that blocks or awaits, in any thread and any event loop."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from jaxengine.channel import Channel

WAIT_S = 10.0


@pytest.fixture
def start() -> Iterator[Callable[..., threading.Thread]]:
    """Runs functions in threads, which are joined at the end."""
    threads = []

    def run(function: Callable[..., object], *args: object) -> threading.Thread:
        threads.append(threading.Thread(target=function, args=args))
        threads[-1].start()
        return threads[-1]

    yield run
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def put_all(channel: Channel, items: range, pause_s: float = 0.0) -> None:
    for item in items:
        time.sleep(pause_s)
        channel.put(item)


async def take(channel: Channel, count: int) -> list[int]:
    async with asyncio.timeout(WAIT_S):
        return [await channel.aget() for _ in range(count)]


def test_items_put_before_are_got_in_order():
    channel = Channel()
    put_all(channel, range(5))
    assert [channel.get() for _ in range(3)] == [0, 1, 2]
    assert asyncio.run(take(channel, 2)) == [3, 4]


@pytest.mark.parametrize("pause_s", [0.0, 0.002])
def test_get_blocks_until_a_thread_puts(start: Callable, pause_s: float):
    channel = Channel()
    start(put_all, channel, range(50), pause_s)
    assert [channel.get() for _ in range(50)] == list(range(50))


@pytest.mark.parametrize("pause_s", [0.0, 0.002])
def test_aget_awaits_until_a_thread_puts(start: Callable, pause_s: float):
    channel = Channel()
    start(put_all, channel, range(50), pause_s)
    assert asyncio.run(take(channel, 50)) == list(range(50))


def test_loop_goes_on_while_aget_waits(start: Callable):
    channel = Channel()

    async def main() -> int:
        reader = asyncio.ensure_future(channel.aget())
        num_turns = 0
        while not reader.done():
            await asyncio.sleep(0.001)
            num_turns += 1
            if num_turns == 5:
                start(channel.put, "item")
        assert await reader == "item"
        return num_turns

    assert asyncio.run(asyncio.wait_for(main(), WAIT_S)) >= 5


def test_two_loops_read_one_after_another(start: Callable):
    channel = Channel()
    start(put_all, channel, range(40), 0.001)
    loop = asyncio.new_event_loop()
    first = loop.run_until_complete(take(channel, 15))
    second = asyncio.run(take(channel, 15))
    third = loop.run_until_complete(take(channel, 10))
    loop.close()
    assert first + second + third == list(range(40))


def test_reader_that_was_cancelled_loses_nothing(start: Callable):
    channel = Channel()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(channel.aget(), 0.01)

    async def main() -> list[int]:
        await give_up()
        start(put_all, channel, range(3), 0.001)
        return await take(channel, 3)

    assert asyncio.run(main()) == [0, 1, 2]


def test_put_after_the_loop_of_a_reader_was_closed():
    channel = Channel()
    loop = asyncio.new_event_loop()
    reader = loop.create_task(channel.aget())
    loop.run_until_complete(asyncio.sleep(0))
    reader.cancel()
    loop.run_until_complete(asyncio.gather(reader, return_exceptions=True))
    loop.close()
    channel.put("late")
    channel.put("later")
    assert channel.get() == "late"
    assert asyncio.run(take(channel, 1)) == ["later"]


def test_many_items_through_threads_and_loops(start: Callable):
    channel, count = Channel(), 8_000
    start(put_all, channel, range(count))
    got = [channel.get() for _ in range(count // 2)]
    got += asyncio.run(take(channel, count // 4))
    got += [channel.get() for _ in range(count // 4)]
    assert got == list(range(count))


def test_ctrl_c_interrupts_get_and_the_channel_goes_on(start: Callable):
    channel, reader = Channel(), threading.get_ident()

    def interrupt() -> None:
        time.sleep(0.1)
        signal.pthread_kill(reader, signal.SIGINT)

    start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        channel.get()
    channel.put("after")
    assert channel.get() == "after"
