"""An engine under pressure: who waits, who must go, and what is not computed twice."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from jaxengine.errors import (
    CapacityError,
    ConfigError,
    EngineDeadError,
    QueueFullError,
    RequestError,
)
from tests.engine import tiny
from tests.engine.conftest import assert_idle, wait_for

LONG = {"max_new_tokens": None, "ignore_eos": True, "temperature": 0}
SHORT = {"max_new_tokens": 8, "ignore_eos": True, "temperature": 0}
PROMPT, LONG_PROMPT = tiny.prompts_of(6, 45)
PAGE = 16


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@contextmanager
def paused(engine: Any, mode: str = "in_place") -> Iterator[None]:
    engine.pause(mode)
    try:
        yield
    finally:
        engine.resume()


def waits_for(engine: Any, count: int) -> None:
    assert wait_for(lambda: engine.stats()["num_waiting"] == count)


def reasons(outputs: list[Any]) -> list[str]:
    return [output["meta_info"]["finish_reason"]["type"] for output in outputs]


# Aborts, pauses, timeouts


def test_abort_takes_an_exact_id_or_a_function(engine: Any, pool: ThreadPoolExecutor):
    with paused(engine):
        arguments = {"input_ids": [PROMPT] * 4, "sampling_params": SHORT}
        call = pool.submit(engine.generate, **arguments, rid=["a", "aa", "b", "c"])
        waits_for(engine, 4)
        engine.abort("a")
        engine.abort_request("nobody")
        engine.abort(lambda rid: rid > "b")
        waits_for(engine, 2)
    outputs = call.result(20)
    assert reasons(outputs) == ["abort", "length", "length", "abort"]
    assert [len(output["output_ids"]) for output in outputs] == [0, 8, 8, 0]
    # One that never ran has all keys, too: SGLang leaves some out.
    assert outputs[0]["meta_info"].keys() == outputs[1]["meta_info"].keys()


@pytest.mark.parametrize("how", ["abort_all", "abort_request", "pause"])
def test_everyone_can_be_aborted_at_once(engine: Any, pool: ThreadPoolExecutor, how: str):
    call = pool.submit(engine.generate, input_ids=[PROMPT] * 4, sampling_params=LONG)
    assert wait_for(lambda: engine.stats()["num_running"] > 0)
    end: Callable[[], None] = {
        "abort_all": engine.abort_all,
        "abort_request": lambda: engine.abort_request(abort_all=True),
        "pause": lambda: engine.pause("abort"),
    }[how]
    end()
    assert reasons(call.result(20)) == ["abort"] * 4
    engine.resume()
    assert_idle(engine)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_changes_no_token(engine: Any, mode: str):
    params = {**LONG, "max_new_tokens": 60, "seed": 5, "temperature": 1.0, "top_p": 0.9}
    [expected] = engine.generate(input_ids=[PROMPT], sampling_params=params, return_logprob=True)
    stream = engine.generate(
        input_ids=PROMPT, sampling_params=params, return_logprob=True, stream=True
    )
    ids = next(stream)["delta_ids"]
    with paused(engine, mode):
        windows = engine.stats()["num_windows"]
        assert engine.stats()["num_running"] == (mode == "in_place")
        time.sleep(0.05)
        assert engine.stats()["num_windows"] == windows
    for chunk in stream:
        ids += chunk["delta_ids"]
    assert ids == chunk["output_ids"] == expected["output_ids"]
    assert chunk["meta_info"]["num_retractions"] == (mode == "retract")
    logprobs = [[p for p, *_ in o["meta_info"]["output_token_logprobs"]] for o in (chunk, expected)]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def test_retracted_requests_outlive_the_memory_they_had(engine: Any):
    params = {**LONG, "max_new_tokens": 60, "seed": 5, "temperature": 1.0, "frequency_penalty": 0.5}
    expected = engine.generate(input_ids=PROMPT, sampling_params=params)["output_ids"]
    stream = engine.generate(input_ids=PROMPT, sampling_params=params, stream=True)
    ids = next(stream)["delta_ids"]
    with paused(engine, "retract"):
        engine.release_memory("kv_cache")
        engine.resume_memory("kv_cache")
    for chunk in stream:
        ids += chunk["delta_ids"]
    assert ids == expected and chunk["meta_info"]["num_retractions"] == 1


def test_pause_has_the_names_of_sglang_and_checks_its_mode(engine: Any):
    engine.pause_generation()
    engine.pause("in_place")
    engine.continue_generation()
    with pytest.raises(ValueError, match="`mode` must be in_place, retract or abort, got 'now'"):
        engine.pause("now")
    tiny.assert_greedy(PROMPT, engine.generate(None, SHORT, PROMPT)["output_ids"])


def test_timeout_ends_its_request_with_what_there_is(engine: Any, pool: ThreadPoolExecutor):
    with paused(engine):
        prompts = [PROMPT] * 2
        call = pool.submit(
            engine.generate, input_ids=prompts, sampling_params=SHORT, timeout_s=[0.05, None]
        )
        waits_for(engine, 2)
        waits_for(engine, 1)
    timed_out, other = call.result(20)
    assert timed_out["meta_info"]["finish_reason"] == {
        "type": "abort",
        "message": "Timed out: `timeout_s` is 0.05.",
        "status_code": None,
        "err_type": None,
    }
    tiny.assert_greedy(PROMPT, other["output_ids"])


def test_shutdown_ends_those_who_wait_for_the_engine_thread(
    make_engine: Any, pool: ThreadPoolExecutor
):
    engine = make_engine()
    is_begun, is_released = threading.Event(), threading.Event()

    def block() -> None:
        is_begun.set()
        is_released.wait(20)

    first = engine._worker.call(block)
    assert is_begun.wait(20)
    second = pool.submit(engine.flush_cache)
    assert wait_for(lambda: len(engine._worker._calls) == 2)
    engine._worker.close()
    is_released.set()
    first.result(20)
    assert isinstance(second.exception(20), EngineDeadError)
    for method in (engine.pause, engine.resume, engine.flush_cache):
        with pytest.raises(EngineDeadError):
            method()
    engine.abort_all()


def test_ctrl_c_aborts_within_a_window(engine: Any):
    for stream in (False, True):
        generated = engine.stats()["num_generated_tokens"]

        def interrupt(before: int = generated) -> None:
            wait_for(lambda: engine.stats()["num_generated_tokens"] > before)
            signal.raise_signal(signal.SIGINT)

        timer = threading.Thread(target=interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in engine.generate(input_ids=[PROMPT] * 20, sampling_params=LONG, stream=stream):
                pass
        timer.join()
        assert_idle(engine)
        assert engine.stats()["num_generated_tokens"] - generated < 10 * 234
        tiny.assert_greedy(PROMPT, engine.generate(None, SHORT, PROMPT)["output_ids"])


# Who is next


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({}, [0, 1, 2]),
        ({"enable_priority_scheduling": True}, [1, 2, 0]),
        (
            {"schedule_policy": "priority", "schedule_low_priority_values_first": True},
            [0, 2, 1],
        ),
        ({"schedule_policy": "priority", "default_priority_value": 7}, [1, 0, 2]),
    ],
)
def test_priority_is_looked_at_where_the_policy_says_so(
    make_engine: Any, changes: dict[str, Any], order: list[int]
):
    engine = make_engine(**changes)
    # Each takes more than half the pages, so they run one after the other.
    prompts = tiny.prompts_of(150, 151, 152)
    stream = engine.generate(
        input_ids=prompts, sampling_params=SHORT, priority=[None, 9, 5], stream=True
    )
    ended = [o["index"] for o in stream if o["meta_info"]["finish_reason"] is not None]
    assert ended == order


def test_priority_may_be_refused_where_it_means_nothing(make_engine: Any):
    engine = make_engine(abort_on_priority_when_disabled=True)
    with pytest.raises(RequestError, match="`priority` of prompt 0 is 3, but this engine has"):
        engine.generate(input_ids=PROMPT, priority=3)
    engine.generate(input_ids=PROMPT, sampling_params=SHORT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule_policy": "lof"}, "`schedule_policy` must be one of fcfs, lpm, priority"),
        ({"schedule_policy": "lpm", "enable_priority_scheduling": True}, "two orders"),
        ({"max_queued_requests": -1}, "`max_queued_requests` must be 0 or more, got -1"),
        ({"priority_scheduling_preemption_threshold": -1}, "must be 0 or more, got -1"),
    ],
)
def test_bad_schedule_is_refused(make_engine: Any, changes: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        make_engine(**changes)


def test_queue_has_a_limit(make_engine: Any, pool: ThreadPoolExecutor):
    engine = make_engine(max_queued_requests=2)
    with paused(engine):
        call = pool.submit(engine.generate, input_ids=[PROMPT] * 5, sampling_params=SHORT)
        waits_for(engine, 5)
        with pytest.raises(QueueFullError, match="2 more samples do not fit: 5 are in flight") as e:
            engine.generate(input_ids=[PROMPT] * 2, sampling_params=SHORT)
        assert isinstance(e.value, CapacityError)
        assert "lets 6 be, those that run included" in str(e.value)
        last = pool.submit(engine.generate, input_ids=PROMPT, sampling_params=SHORT)
        waits_for(engine, 6)
    assert reasons([*call.result(20), last.result(20)]) == ["length"] * 6
    engine.generate(input_ids=[PROMPT] * 6, sampling_params=SHORT)


# What is not computed twice


@pytest.fixture
def compute(engine: Any) -> Callable[..., int]:
    """Prompt tokens computed; `cached_tokens` must say which were not."""
    engine.flush_cache()

    def compute(prompts: list[list[int]], n: int = 1, **arguments: Any) -> int:
        before = engine.stats()
        outputs = engine.generate(input_ids=prompts, sampling_params={**SHORT, "n": n}, **arguments)
        after = engine.stats()
        assert after["num_retractions"] == before["num_retractions"]
        count = after["num_prefill_tokens"] - before["num_prefill_tokens"]
        metas = [output["meta_info"] for output in outputs]
        cached = sum(meta["cached_tokens"] for meta in metas)
        assert count + cached == sum(meta["prompt_tokens"] for meta in metas)
        for i, output in enumerate(outputs):
            tiny.assert_greedy(prompts[i // n], output["output_ids"])
        return count

    return compute


def test_second_identical_prompt_computes_its_last_page_only(engine: Any, compute: Any):
    assert compute([LONG_PROMPT]) == 45
    assert compute([LONG_PROMPT]) == 45 - 2 * PAGE
    assert engine.flush_cache().success
    assert compute([LONG_PROMPT]) == 45


def test_samples_and_equal_prompts_compute_their_beginning_once(compute: Any):
    assert compute([LONG_PROMPT], n=4) == 45 + 3 * (45 - 2 * PAGE)
    other = tiny.prompts_of(40, seed=9)[0]
    assert compute([other, other, other]) == 40 + 2 * (40 - 2 * PAGE)


def test_answer_and_next_turn_go_on_from_the_cache(engine: Any, compute: Any):
    answer = engine.generate(input_ids=LONG_PROMPT, sampling_params=SHORT)["output_ids"]
    chat = [*LONG_PROMPT, *answer, *PROMPT]
    # Of 53 tokens 52 were computed, and 48 fill pages.
    assert compute([chat]) == len(chat) - 3 * PAGE


def test_salt_and_extra_key_share_nothing(compute: Any):
    rest = 45 - 2 * PAGE
    for arguments in ({}, {"cache_salt": "a"}, {"extra_key": "a"}, {"cache_salt": ["b"]}):
        assert compute([LONG_PROMPT], **arguments) == 45
        assert compute([LONG_PROMPT], **arguments) == rest


def test_prefix_cache_can_be_disabled(make_engine: Any):
    engine = make_engine(disable_radix_cache=True)
    for _ in range(2):
        output = engine.generate(input_ids=LONG_PROMPT, sampling_params=SHORT)
        assert output["meta_info"]["cached_tokens"] == 0
    stats = engine.stats()
    assert stats["num_prefill_tokens"] == 90 and stats["num_cached_pages"] == 0


def test_small_pool_preempts_and_changes_no_token(engine: Any):
    """Four of 60 + 40 tokens want 28 pages; there are 15."""
    before = engine.stats()["num_retractions"]
    prompts = tiny.prompts_of(20, 20, 20, 20, seed=4)
    outputs = engine.generate(
        input_ids=prompts, sampling_params={**SHORT, "max_new_tokens": 80}, return_logprob=True
    )
    counts = [output["meta_info"]["num_retractions"] for output in outputs]
    assert 0 < sum(counts) == engine.stats()["num_retractions"] - before
    for prompt, output in zip(prompts, outputs, strict=True):
        tiny.assert_greedy(prompt, output["output_ids"])
        logits = tiny.step_logits(prompt, output["output_ids"])
        expected = tiny.log_softmax(logits)[range(80), output["output_ids"]]
        reported = output["meta_info"]["output_token_raw_logprobs"]
        assert reported == pytest.approx(expected, abs=1e-3)


def test_stats_show_the_queue_the_pages_the_cache_and_the_waste(engine: Any):
    stats = engine.stats()
    for name in ("num_waiting", "num_running", "num_pages", "num_free_pages", "num_cached_pages"):
        assert stats[name] >= 0
    for name in (
        "masked_row_waste",
        "decode_padding_waste",
        "prefill_padding_waste",
        "cache_hit_rate",
    ):
        assert 0 <= stats[name] <= 1
    assert stats["num_pages"] == 240 // PAGE and 1 <= stats["mean_window_steps"] <= 32
