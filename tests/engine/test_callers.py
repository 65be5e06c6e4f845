"""Callers of every kind: event loops, threads, and those who leave half way."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, contextmanager
from typing import Any

import pytest

from tests.engine import tiny
from tests.engine.conftest import assert_idle

LONG = {"max_new_tokens": None, "ignore_eos": True, "temperature": 0}
SHORT = {"max_new_tokens": 12, "ignore_eos": True, "temperature": 0}
[PROMPT] = tiny.prompts_of(6)
MANY = [PROMPT] * 20


@contextmanager
def stopping(engine: Any) -> Iterator[None]:
    """Within, callers of MANY leave early; after it nothing runs, and the engine answers."""
    generated = engine.stats()["num_generated_tokens"]
    yield
    gc.collect()
    assert_idle(engine)
    assert len(engine._submitter.in_flight) == 0
    room = engine.config.max_total_tokens - len(PROMPT)
    assert engine.stats()["num_generated_tokens"] - generated < len(MANY) * room / 2
    tiny.assert_greedy(PROMPT, sync_ids(engine))


async def async_ids(engine: Any) -> list[int]:
    output = await engine.async_generate(input_ids=PROMPT, sampling_params=SHORT)
    return output["output_ids"]


def sync_ids(engine: Any) -> list[int]:
    return engine.generate(input_ids=PROMPT, sampling_params=SHORT)["output_ids"]


def test_one_engine_serves_many_event_loops_and_none(engine: Any):
    """The order in which SGLang hangs: sync, run_until_complete, asyncio.run."""
    expected = sync_ids(engine)
    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(async_ids(engine)) == expected
        assert sync_ids(engine) == expected
        assert asyncio.run(async_ids(engine)) == expected
        assert loop.run_until_complete(async_ids(engine)) == expected
    finally:
        loop.close()
    assert asyncio.run(async_ids(engine)) == expected


def test_sync_calls_work_under_a_running_loop(engine: Any):
    """As in a notebook cell."""

    async def cell() -> tuple[Any, ...]:
        streamed = list(engine.generate(input_ids=PROMPT, sampling_params=SHORT, stream=True))
        return sync_ids(engine), await async_ids(engine), streamed[-1]["output_ids"]

    assert len({tuple(ids) for ids in asyncio.run(cell())}) == 1


def test_engine_may_be_made_under_a_running_loop(make_engine: Any):
    async def cell() -> Any:
        engine = make_engine()
        return engine, sync_ids(engine), await async_ids(engine)

    engine, first, second = asyncio.run(cell())
    assert first == second == sync_ids(engine)


def test_eight_threads_call_at_once(engine: Any):
    """Sync and async, whole and streamed, each in a loop of its own where it needs one."""

    async def streamed() -> list[int]:
        stream = await engine.async_generate(input_ids=PROMPT, sampling_params=SHORT, stream=True)
        return [token_id async for chunk in stream for token_id in chunk["delta_ids"]]

    kinds: list[Callable[[], list[int]]] = [
        lambda: sync_ids(engine),
        lambda: asyncio.run(async_ids(engine)),
        lambda: asyncio.run(streamed()),
        lambda: [
            token_id
            for chunk in engine.generate(input_ids=PROMPT, sampling_params=SHORT, stream=True)
            for token_id in chunk["delta_ids"]
        ],
    ]
    start = threading.Barrier(8)

    def call(i: int) -> list[list[int]]:
        start.wait()
        return [kinds[i % 4]() for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        results = [ids for run in pool.map(call, range(8)) for ids in run]
    assert len(results) == 40
    assert len({tuple(ids) for ids in results}) == 1


def test_many_tasks_of_one_loop_share_the_engine(engine: Any):
    async def run() -> list[list[int]]:
        return await asyncio.gather(*(async_ids(engine) for _ in range(20)))

    assert len({tuple(ids) for ids in asyncio.run(run())}) == 1


def test_closed_stream_stops_its_request(engine: Any):
    with stopping(engine):
        stream = engine.generate(input_ids=MANY, sampling_params=LONG, stream=True)
        with closing(stream):
            next(stream)
        assert list(stream) == []


def test_stream_left_by_break_stops_its_request(engine: Any):
    with stopping(engine):
        for _ in engine.generate(input_ids=MANY, sampling_params=LONG, stream=True):
            break


def test_stream_left_by_an_exception_stops_its_request(engine: Any):
    with stopping(engine), pytest.raises(ZeroDivisionError):
        for _ in engine.generate(input_ids=MANY, sampling_params=LONG, stream=True):
            _ = 1 / 0


def test_stream_never_read_stops_when_it_is_dropped(engine: Any):
    with stopping(engine):
        engine.generate(input_ids=MANY, sampling_params=LONG, stream=True)


def test_closed_async_stream_stops_its_request(engine: Any):
    async def run() -> None:
        stream = await engine.async_generate(input_ids=MANY, sampling_params=LONG, stream=True)
        async with aclosing(stream) as chunks:
            async for _ in chunks:
                break
        assert [chunk async for chunk in stream] == []

    with stopping(engine):
        asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps_first", [0, 1, 3])
def test_cancelled_task_stops_its_requests(engine: Any, stream: bool, steps_first: int):
    async def generate() -> None:
        result = await engine.async_generate(input_ids=MANY, sampling_params=LONG, stream=stream)
        async for _ in result:
            pass

    async def run() -> None:
        task = asyncio.create_task(generate())
        for _ in range(steps_first):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await async_ids(engine)

    with stopping(engine):
        asyncio.run(run())


def test_task_that_times_out_stops_its_request(engine: Any):
    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await engine.async_generate(input_ids=MANY, sampling_params=LONG)

    with stopping(engine):
        asyncio.run(run())


def test_loop_that_ends_under_a_request_stops_it(engine: Any):
    async def run(tasks: set[asyncio.Future]) -> None:
        stream = await engine.async_generate(input_ids=MANY, sampling_params=LONG, stream=True)
        await anext(stream)
        tasks.add(asyncio.ensure_future(anext(stream)))
        await asyncio.sleep(0)

    with stopping(engine):
        asyncio.run(run(set()))
