"""imap and aimap: the results of generate, lazily, a bounded number in flight."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest

from jaxengine.errors import RequestError
from tests.engine import tiny
from tests.engine.conftest import assert_idle

PROMPTS = tiny.prompts_of(*[3, 9, 5, 30, 2, 7, 4, 11] * 2)
PARAMS = {"temperature": 0.9, "max_new_tokens": 6, "ignore_eos": True, "seed": 3}


def ids(results: Any) -> list[list[int]]:
    return [output["output_ids"] for output in results]


async def gather(stream: AsyncIterator[Any]) -> list[Any]:
    return [result async for result in stream]


async def slowly(items: Any) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0.001)
        yield item


def test_imap_gives_what_generate_gives_for_the_list(engine: Any):
    expected = ids(engine.generate(input_ids=PROMPTS, sampling_params=PARAMS))
    assert ids(engine.imap(iter(PROMPTS), PARAMS, max_in_flight=3)) == expected
    as_completed = dict(engine.imap(PROMPTS, PARAMS, ordered=False))
    assert ids(as_completed[i] for i in range(len(PROMPTS))) == expected
    assert ids(asyncio.run(gather(engine.aimap(PROMPTS, PARAMS)))) == expected
    slow = engine.aimap(slowly(PROMPTS), PARAMS, max_in_flight=2)
    assert ids(asyncio.run(gather(slow))) == expected


def test_imap_takes_items_lazily_and_stops_what_it_left(engine: Any):
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield PROMPTS[0]

    with closing(engine.imap(endless(), PARAMS, max_in_flight=4)) as results:
        firsts = list(itertools.islice(results, 10))
    assert len(firsts) == 10
    assert taken <= 10 + 4 + 1
    assert_idle(engine)


def test_aimap_stops_what_it_left(engine: Any):
    async def some() -> int:
        async with aclosing(engine.aimap(itertools.repeat(PROMPTS[0]), PARAMS)) as results:
            await anext(results)
            return len([task for task in asyncio.all_tasks() if not task.done()])

    assert asyncio.run(some()) >= 1
    assert_idle(engine)


def test_ordered_results_wait_for_a_slow_one_within_bounds(engine: Any):
    taken = 0

    def items() -> Iterator[Any]:
        nonlocal taken
        yield {"input_ids": PROMPTS[0], "sampling_params": {"max_new_tokens": 150}}
        for _ in range(59):
            taken += 1
            yield {"input_ids": PROMPTS[0], "sampling_params": {"max_new_tokens": 1}}

    results = engine.imap(items(), PARAMS, max_in_flight=2)
    assert len(next(results)["output_ids"]) == 150
    # Two in flight, eight times two that wait, and no more.
    assert 2 <= taken <= 18
    assert [len(output["output_ids"]) for output in results] == [1] * 59


def test_items_bring_their_own_arguments(engine: Any):
    items = [
        {"input_ids": PROMPTS[1], "sampling_params": {"max_new_tokens": 2}, "rid": "mine"},
        {"input_ids": PROMPTS[1], "sampling_params": {"n": 2}},
    ]
    single, pair = engine.imap(items, PARAMS, return_logprob=True)
    assert single["meta_info"]["id"] == "mine"
    assert [lp[1] for lp in single["meta_info"]["output_token_logprobs"]] == single["output_ids"]
    assert len(single["output_ids"]) == 2
    assert [len(output["output_ids"]) for output in pair] == [6, 6]


def test_a_key_of_its_own_makes_a_sample_independent_of_its_place(engine: Any):
    item = {"input_ids": PROMPTS[3], "seed_key": "row 17"}
    first, _, third = ids(engine.imap([item, PROMPTS[0], item], PARAMS))
    assert first == third


BAD = [{"input_ids": [1, 2, 999]}, {"input_ids": [5], "sampling_params": {"top_q": 1}}, 7, []]


@pytest.mark.parametrize("is_async", [False, True])
def test_errors_stand_in_their_place_where_they_are_wanted(engine: Any, is_async: bool):
    items = [PROMPTS[0], *BAD, PROMPTS[1], RequestError("mine")]
    if is_async:
        results = asyncio.run(gather(engine.aimap(items, PARAMS, on_error="return")))
    else:
        results = list(engine.imap(items, PARAMS, on_error="return"))
    kinds = [type(result).__name__ if isinstance(result, Exception) else "" for result in results]
    assert kinds == ["", "RequestError", "TypeError", *["RequestError"] * 2, "", "RequestError"]
    assert str(results[-1]) == "mine"


def test_the_first_error_is_raised_and_names_its_item(engine: Any):
    for results in (
        lambda: list(engine.imap([PROMPTS[0], *BAD], PARAMS)),
        lambda: asyncio.run(gather(engine.aimap([PROMPTS[0], *BAD], PARAMS))),
    ):
        with pytest.raises(RequestError, match="vocabulary") as caught:
            results()
        assert caught.value.__notes__ == ["It was item 1 of the iterator."]
    assert_idle(engine)


def test_a_source_that_fails_is_heard(engine: Any):
    def broken() -> Iterator[Any]:
        yield PROMPTS[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(engine.imap(broken(), PARAMS))
    with pytest.raises(OSError, match="the disk is gone"):
        asyncio.run(gather(engine.aimap(broken(), PARAMS)))
    assert_idle(engine)


@pytest.mark.parametrize("bad", [{"max_in_flight": 0}, {"on_error": "ignore"}])
def test_bad_settings_are_named(engine: Any, bad: dict[str, Any]):
    with pytest.raises(RequestError, match=f"`{next(iter(bad))}` must be"):
        engine.imap([], PARAMS, **bad)


def test_progress_shows_speed_and_changes_nothing(engine: Any, capsys: pytest.CaptureFixture[str]):
    expected = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS)
    assert capsys.readouterr().err == ""
    shown = engine.generate(input_ids=PROMPTS, sampling_params=PARAMS, progress=True)
    assert ids(shown) == ids(expected)
    bar = capsys.readouterr().err
    assert f"{len(PROMPTS)}/{len(PROMPTS)}" in bar
    assert "tok/s" in bar
