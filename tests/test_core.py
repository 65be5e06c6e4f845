"""The step, on a fake device: who ends when and how, what is counted, what a failure touches."""

import pytest

from jaxengine.errors import NaNLogitsError, StepError
from jaxengine.types import StopReason
from tests.fake_runner import NAN_TOKEN, Fault, InjectedFault, make_request, oracle
from tests.scheduler.driver import Driver, make_buckets

STOP = 63


def test_short_request_submitted_while_a_long_one_decodes_finishes_first():
    driver = Driver(make_buckets())
    driver.add(make_request(0, 10, 300))
    while len(driver.tokens[0]) < 20:
        driver.step()
    driver.add(make_request(1, 10, 5))
    driver.run()
    assert driver.finish_order == [1, 0]


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize("max_new_tokens", [9, 20, 100, 128])
def test_one_stream_takes_long_windows_and_one_read_each(max_new_tokens: int, is_streaming: bool):
    driver = Driver(make_buckets())
    driver.add(make_request(0, 10, max_new_tokens, is_streaming=is_streaming))
    driver.run()
    stats = driver.core.stats()
    assert stats["mean_window_steps"] >= 8
    assert stats["num_host_reads"] == stats["num_windows"] + stats["num_prefills"]
    assert stats["num_windows"] <= max_new_tokens / 8


def test_next_step_is_dispatched_before_the_last_is_read():
    driver = Driver(make_buckets())
    driver.add(make_request(0, 10, 100))
    progress = []
    for _ in range(3):
        driver.step()
        progress.append((len(driver.runner.plans), driver.runner.num_reads))
    assert progress == [(1, 0), (2, 1), (3, 2)]


def test_idle_core_does_nothing():
    driver = Driver(make_buckets())
    assert not driver.core.has_work
    assert driver.core.step() == []
    assert driver.runner.plans == []


def test_stats_add_up():
    driver = Driver(make_buckets(num_slots=4))
    driver.add(*(make_request(i, 7, 20 + i) for i in range(6)))
    assert driver.core.stats()["num_waiting"] == 6
    driver.run()
    stats = driver.core.stats()
    assert stats["num_finished"] == 6
    assert stats["num_generated_tokens"] == sum(len(t) for t in driver.tokens.values())
    assert stats["num_prefill_tokens"] == 6 * 7
    assert (stats["num_waiting"], stats["num_running"]) == (0, 0)
    assert stats["num_free_pages"] == driver.pool.capacity
    assert all(seconds >= 0 for seconds in stats["seconds"].values())


# How a sequence ends


@pytest.mark.parametrize(
    ("script", "kwargs", "length", "finish"),
    [
        ({}, {}, 10, StopReason("length", length=10)),
        ({4: STOP}, {}, 5, StopReason("stop", matched=STOP)),
        ({0: STOP}, {}, 1, StopReason("stop", matched=STOP)),
        ({9: STOP}, {}, 10, StopReason("length", length=10)),
        ({4: STOP}, {"ignore_eos": True}, 10, StopReason("length", length=10)),
    ],
)
def test_finish_reason(script: dict, kwargs: dict, length: int, finish: StopReason):
    driver = Driver(make_buckets())
    driver.add(make_request(0, 5, 10, script=script, stop_token_ids=(STOP, 1000), **kwargs))
    driver.run()
    assert driver.endings[0].finish == finish
    assert len(driver.tokens[0]) == length


def test_limit_of_one_token_ends_with_length_even_at_a_stop_token():
    driver = Driver(make_buckets())
    driver.add(make_request(0, 5, 1, script={0: STOP}, stop_token_ids=(STOP,)))
    driver.run()
    assert driver.endings[0].finish == StopReason("length", length=1)
    assert driver.tokens[0] == [STOP]
    assert driver.scheduler.stats.num_windows == 0


def test_limit_of_no_token_computes_the_prompt_alone():
    driver = Driver(make_buckets())
    driver.add(make_request(0, 5, 0), make_request(1, 5, 3))
    driver.run()
    assert driver.endings[0].finish == StopReason("length", length=0)
    assert driver.tokens[0] == []
    assert driver.scheduler.stats.num_generated_tokens == 3


@pytest.mark.parametrize("nan_at", [0, 1, 11])
def test_nan_fails_only_its_request(nan_at: int):
    driver = Driver(make_buckets())
    driver.add(make_request(0, 5, 30, script={nan_at: NAN_TOKEN}))
    driver.add(make_request(1, 5, 30), make_request(2, 5, 30))
    driver.run()
    error = driver.endings[0].error
    assert isinstance(error, NaNLogitsError)
    assert "request-0" in str(error) and f"after {nan_at} tokens" in str(error)
    assert driver.tokens[0] == oracle(driver.requests[0]).token_ids
    assert driver.runner.num_resets == 1
    assert all(driver.endings[i].finish for i in (1, 2))


# Aborts


def test_abort_gives_slot_and_pages_back_at_once():
    driver = Driver(make_buckets(num_slots=1))
    driver.add(make_request(0, 30, 300), make_request(1, 5, 5))
    for _ in range(4):
        driver.step()
    num_tokens = len(driver.tokens[0])
    assert num_tokens > 0 and driver.cache.num_available < driver.pool.capacity
    driver.abort(0)
    assert driver.cache.num_available == driver.pool.capacity
    driver.run()
    assert driver.finish_order == [1] and len(driver.tokens[0]) == num_tokens


def test_abort_of_the_only_request_drops_what_is_in_flight():
    driver = Driver(make_buckets())
    driver.add(make_request(0, 5, 100))
    driver.step()
    driver.abort(0)
    assert driver.core.has_work  # a step is still on the device
    driver.run()
    assert driver.tokens[0] == [] and driver.runner.num_reads == 1


def test_abort_works_in_every_state():
    for num_steps in range(12):
        driver = Driver(make_buckets(num_slots=2, prefill_tokens=(4,)), num_pages=9)
        driver.add(*(make_request(i, 12, 18) for i in range(4)))
        for _ in range(num_steps):
            driver.step()
        for seq_id in (3, 1):
            driver.abort(seq_id)
            driver.abort(seq_id)
        driver.run()
        assert driver.aborted | set(driver.endings) == {0, 1, 2, 3}
    assert not driver.core.finish(99)


# Timeouts and pauses


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("jaxengine.core.time.monotonic", lambda: now[0])
    return now


def test_timeout_ends_requests_that_run_and_those_that_wait(clock: list[float]):
    driver = Driver(make_buckets(num_slots=1))
    driver.add(make_request(0, 5, 300, timeout_s=2.0), make_request(1, 5, 300, timeout_s=2.5))
    driver.add(make_request(2, 5, 3, timeout_s=60.0))
    assert driver.core.seconds_to_deadline == 2.0
    for _ in range(4):
        driver.step()
    clock[0] += 3.0
    driver.step()
    finishes = [driver.endings[i].finish for i in (0, 1)]
    assert [f.type for f in finishes if f] == ["abort", "abort"]
    assert finishes[1] and finishes[1].message == "Timed out: `timeout_s` is 2.5."
    assert len(driver.tokens[0]) > 0 and driver.tokens[1] == []
    driver.run()
    assert driver.endings[2].finish == StopReason("length", length=3)
    clock[0] += 100.0
    assert driver.step() == [] and driver.core.seconds_to_deadline is None


@pytest.mark.parametrize("keeps_pages", [True, False])
def test_pause_reads_what_is_under_way_and_starts_nothing(keeps_pages: bool):
    driver = Driver(make_buckets(num_slots=2))
    driver.add(*(make_request(i, 5, 100, is_streaming=i == 1) for i in range(4)))
    for _ in range(3):
        driver.step()
    updates = driver.core.pause(keeps_pages=keeps_pages)
    driver.receive(updates)
    assert not driver.core.has_work
    num_plans = len(driver.runner.plans)
    driver.add(make_request(4, 5, 10))
    assert driver.step() == [] and len(driver.runner.plans) == num_plans
    assert driver.scheduler.num_running == (2 if keeps_pages else 0)
    driver.core.resume()
    driver.run()
    assert driver.finish_order[-1] == 4
    assert driver.scheduler.stats.num_retractions == (0 if keeps_pages else 2)


def test_timeout_ends_requests_while_paused(clock: list[float]):
    driver = Driver(make_buckets())
    driver.core.pause(keeps_pages=True)
    driver.add(make_request(0, 5, 300, timeout_s=2.0))
    clock[0] += 3.0
    assert not driver.core.has_work and driver.core.seconds_to_deadline == 0.0
    driver.step()
    assert 0 in driver.endings


# Preemption


def test_preemption_keeps_the_tokens_and_is_counted():
    driver = Driver(make_buckets(max_window_steps=4), num_pages=12)
    driver.add(*(make_request(i, 5, 35, wants_logprobs=True, seed=i) for i in range(3)))
    driver.run()
    stats = driver.scheduler.stats
    assert stats.num_retractions > 0
    counted = {i: update.num_retractions for i, update in driver.endings.items()}
    assert counted[0] == 0 and sum(counted.values()) == stats.num_retractions
    assert stats.num_generated_tokens == 3 * 35


def test_preemption_repeats_no_streamed_token():
    driver = Driver(make_buckets(max_window_steps=4), num_pages=9)
    driver.add(*(make_request(i, 5, 20, is_streaming=True) for i in range(2)))
    streamed: dict[int, list[int]] = {0: [], 1: []}
    while driver.core.has_work:
        for update in driver.step():
            streamed[update.seq_id] += update.token_ids
    assert driver.scheduler.stats.num_retractions > 0
    assert streamed == {i: oracle(r).token_ids for i, r in driver.requests.items()}


# Failures


@pytest.mark.parametrize("where", ["dispatch", "result"])
@pytest.mark.parametrize("number", range(8))
def test_failed_step_fails_its_own_sequences(where: Fault, number: int):
    buckets = make_buckets(num_slots=3, prefill_tokens=(8,))
    driver = Driver(buckets, faults={number: where})
    driver.add(*(make_request(i, 6, 40, seed=i) for i in range(5)))
    driver.run()
    (plan,) = driver.runner.failed
    failed = {i for i, update in driver.endings.items() if update.error}
    assert failed == set(plan.seq_ids) and len(failed) < 5
    for seq_id in failed:
        error = driver.endings[seq_id].error
        assert isinstance(error, StepError) and isinstance(error.__cause__, InjectedFault)
        assert "InjectedFault: the device caught fire" in str(error)
        assert f"{len(plan.rows)} sequences were in it" in str(error)
    assert driver.runner.num_resets == 2
    driver.add(make_request(5, 6, 40))
    driver.run()
    assert driver.endings[5].finish == StopReason("length", length=40)


def test_every_step_may_fail():
    driver = Driver(make_buckets(num_slots=2), faults=dict.fromkeys(range(100), "dispatch"))
    driver.add(*(make_request(i, 6, 40) for i in range(6)))
    driver.run()
    assert all(isinstance(update.error, StepError) for update in driver.endings.values())


def test_failure_says_how_many_pages_and_bytes_were_free():
    driver = Driver(make_buckets(), num_pages=11, faults={1: "dispatch"})
    driver.add(make_request(0, 6, 20), make_request(1, 6, 0))
    driver.run()
    assert "3 KV pages (1.5 MB) of 10 KV pages (5.0 MB) were free" in str(driver.endings[0].error)


def test_what_ran_before_a_failed_dispatch_is_delivered():
    driver = Driver(make_buckets(), faults={2: "dispatch"})
    driver.add(make_request(0, 6, 200, is_streaming=True))
    driver.run()
    assert isinstance(driver.endings[0].error, StepError)
    assert len(driver.tokens[0]) == 1 + 8


def test_device_state_that_cannot_be_made_anew_fails_everyone_until_it_can():
    driver = Driver(make_buckets(), faults={1: "dispatch"}, failing_resets={2, 3})
    driver.add(*(make_request(i, 6, 40) for i in range(3)))
    driver.run()
    errors = [str(driver.endings[i].error) for i in range(3)]
    assert all("device caught fire" in error or "made anew" in error for error in errors)
    driver.add(make_request(3, 6, 40))
    driver.run()
    assert "MemoryError: no room for the pages). It needs 999 KV pages (499.5 MB)" in str(
        driver.endings[3].error
    )
    driver.add(make_request(4, 6, 40))
    driver.run()
    assert driver.endings[4].finish == StopReason("length", length=40)


def test_state_of_a_sampler_lost_with_the_device_fails_its_request_alone():
    # Prefill of 0 and 1, their window, prefill of 2: it fails.
    driver = Driver(make_buckets(), faults={2: "result"})
    driver.add(make_request(0, 6, 100, is_stateful=True), make_request(1, 6, 100))
    driver.step()
    driver.step()
    driver.add(make_request(2, 6, 10))
    driver.run()
    assert "the state its sampler had of the tokens" in str(driver.endings[0].error)
    assert driver.endings[1].finish == StopReason("length", length=100)


@pytest.mark.parametrize("where", ["dispatch", "result"])
def test_tokens_lost_in_the_failure_of_another_are_drawn_again(where: Fault):
    # Prefill of 0, window of 0, prefill of 1: it fails with windows of 0 in flight.
    driver = Driver(make_buckets(), faults={2: where})
    driver.add(make_request(0, 6, 200, wants_logprobs=True))
    driver.step()
    driver.step()
    driver.add(make_request(1, 6, 10))
    driver.run()
    assert isinstance(driver.endings[1].error, StepError)
    assert driver.endings[0].finish == StopReason("length", length=200)
    assert driver.scheduler.stats.num_generated_tokens == 200
