"""Who is next: first come, longest prefix or highest priority; and that nobody waits for ever."""

import pytest

from jaxengine.scheduler.policy import MAX_OVERTAKEN, Policy
from jaxengine.types import SequenceRequest
from tests.fake_runner import make_request
from tests.scheduler.driver import Driver, make_buckets

LPM = Policy(schedule_policy="lpm")
PRIORITY = Policy(schedule_policy="priority")


def start_order(driver: Driver) -> list[int]:
    """Sequences in the order in which they started for the first time."""
    rows = [row for plan in driver.runner.plans for row in getattr(plan, "new_rows", [])]
    return list(dict.fromkeys(row.request.seq_id for row in rows))


def prompt(first: int, length: int) -> list[int]:
    return [first] * length


def test_longest_cached_prefix_goes_first():
    driver = Driver(make_buckets(num_slots=1), policy=LPM)
    driver.add(make_request(0, 0, 4, prompt_ids=prompt(5, 20)))
    driver.run()
    driver.add(make_request(1, 0, 4, prompt_ids=prompt(1, 20)))
    driver.add(make_request(2, 0, 4, prompt_ids=prompt(5, 9)))
    driver.add(make_request(3, 0, 4, prompt_ids=prompt(5, 17)))
    driver.run()
    assert start_order(driver) == [0, 3, 2, 1]


def test_highest_priority_goes_first_and_equals_in_their_order():
    for low_first in (False, True):
        policy = Policy(schedule_policy="priority", low_values_first=low_first)
        driver = Driver(make_buckets(num_slots=1), policy=policy)
        sign = -1 if low_first else 1
        for seq_id, priority in enumerate([0, 3, 9, 3, 0]):
            driver.add(make_request(seq_id, 5, 4, priority=sign * priority))
        driver.run()
        assert start_order(driver) == [2, 1, 3, 0, 4]


def test_priority_means_nothing_to_first_come_first_served():
    driver = Driver(make_buckets(num_slots=1))
    driver.add(*(make_request(i, 5, 4, priority=100 * i) for i in range(4)))
    driver.run()
    assert driver.finish_order == [0, 1, 2, 3]


@pytest.mark.parametrize("what_is_short", ["slots", "pages"])
@pytest.mark.parametrize(("gap", "is_preempted"), [(9, False), (10, True)])
def test_urgent_request_preempts_from_the_threshold_on(
    what_is_short: str, gap: int, is_preempted: bool
):
    num_slots, num_pages = (1, 1000) if what_is_short == "slots" else (4, 12)
    buckets = make_buckets(num_slots=num_slots, max_window_steps=4)
    driver = Driver(buckets, num_pages=num_pages, policy=PRIORITY)
    driver.add(make_request(0, 8, 32))
    for _ in range(6):
        driver.step()
    driver.add(make_request(1, 20, 8, priority=gap))
    driver.run()
    assert driver.finish_order == ([1, 0] if is_preempted else [0, 1])
    assert driver.endings[0].num_retractions == is_preempted


def test_least_urgent_gives_way_and_nobody_in_vain():
    driver = Driver(make_buckets(num_slots=2), policy=PRIORITY)
    driver.add(make_request(0, 5, 200, priority=5), make_request(1, 5, 200, priority=0))
    for _ in range(4):
        driver.step()
    driver.add(make_request(2, 5, 5, priority=20))
    driver.run()
    assert driver.finish_order[0] == 2
    assert [driver.endings[i].num_retractions for i in (0, 1)] == [0, 1]
    # Two slots are wanted, and only one could be had.
    pair = make_request(13, 5, 5, priority=12, companions=(make_request(99, 4, 0),))
    driver.add(make_request(10, 5, 100, priority=9), make_request(11, 5, 100, priority=0))
    for _ in range(4):
        driver.step()
    driver.add(pair)
    driver.run()
    assert driver.endings[11].num_retractions == 0


def test_slot_with_the_state_of_a_sampler_is_not_taken():
    driver = Driver(make_buckets(num_slots=1), policy=PRIORITY)
    driver.add(make_request(0, 5, 100, is_stateful=True))
    for _ in range(4):
        driver.step()
    driver.add(make_request(1, 5, 5, priority=50))
    driver.run()
    assert driver.finish_order == [0, 1] and driver.endings[0].finish


@pytest.mark.parametrize("policy", [LPM, PRIORITY], ids=["lpm", "priority"])
def test_wait_is_bounded_while_better_ones_never_cease(policy: Policy):
    """One that is always worse starts after at most MAX_OVERTAKEN later ones, and then stays."""

    def better(i: int) -> SequenceRequest:
        return make_request(i, 0, 8, prompt_ids=prompt(5, 13), priority=100)

    driver = Driver(make_buckets(num_slots=1), num_pages=60, policy=policy)
    driver.add(better(0))
    driver.step()
    driver.add(make_request(1000, 0, 8, prompt_ids=prompt(1, 9)))
    for seq_id in range(1, 4 * MAX_OVERTAKEN):
        if 1000 in driver.endings:
            break
        driver.add(better(seq_id))
        while driver.scheduler.num_waiting > 2 and 1000 not in driver.endings:
            driver.step()
    order = start_order(driver)
    assert order.index(1000) == MAX_OVERTAKEN + 1
    assert driver.endings[1000].num_retractions == 0
    driver.run()


def test_everyone_starts_after_a_pause_that_took_the_pages():
    """Those behind who kept their slots do not keep them from the one in front."""
    driver = Driver(make_buckets(num_slots=2), policy=PRIORITY)
    driver.add(make_request(0, 5, 50, is_stateful=True), make_request(1, 5, 50, is_stateful=True))
    for _ in range(4):
        driver.step()
    driver.receive(driver.core.pause(keeps_pages=False))
    driver.add(make_request(2, 5, 5, priority=100))
    driver.core.resume()
    driver.run()
    assert driver.finish_order == [0, 1, 2]
