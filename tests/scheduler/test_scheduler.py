"""What is planned when: chunks, packing, window lengths, turns, shapes, pages."""

from typing import Any

import numpy as np
import pytest

from jaxengine.scheduler.decode import STREAM_WINDOW_STEPS
from jaxengine.scheduler.plan import DecodePlan, PrefillPlan
from jaxengine.scheduler.prefill import STREAM_CHUNK_TOKENS
from jaxengine.scheduler.scheduler import MAX_PREFILLS_IN_A_ROW
from jaxengine.scheduler.sequence import Sequence
from jaxengine.types import SequenceRequest, StopReason
from tests.fake_runner import make_request
from tests.scheduler.driver import Driver, make_buckets


def prefills(driver: Driver) -> list[PrefillPlan]:
    return [plan for plan in driver.runner.plans if isinstance(plan, PrefillPlan)]


def windows(driver: Driver) -> list[DecodePlan]:
    return [plan for plan in driver.runner.plans if isinstance(plan, DecodePlan)]


def kinds(driver: Driver) -> str:
    """The plans so far, a letter each: p or d."""
    return "".join("p" if isinstance(plan, PrefillPlan) else "d" for plan in driver.runner.plans)


# Prefill


def test_long_prompt_is_cut_into_chunks_and_draws_once():
    driver = Driver(make_buckets(prefill_tokens=(4, 16)))
    driver.add(make_request(0, 50, 1))
    driver.run()
    rows = [row for plan in prefills(driver) for row in plan.rows]
    assert [len(row.token_ids) for row in rows] == [16, 16, 16, 2]
    assert [row.start for row in rows] == [0, 16, 32, 48]
    assert [row.draws for row in rows] == [False, False, False, True]
    assert [plan.num_tokens for plan in prefills(driver)] == [16, 16, 16, 4]
    assert [len(plan.new_rows) for plan in prefills(driver)] == [1, 0, 0, 0]
    assert driver.scheduler.stats.num_prefill_tokens == 50
    assert driver.scheduler.stats.num_prefill_padding == 2


def test_prompts_are_packed_and_the_rest_of_one_comes_before_the_next():
    driver = Driver(make_buckets(prefill_tokens=(16,)))
    driver.add(*(make_request(i, 6, 1) for i in range(4)))
    driver.run()
    packed = [[(row.seq_id, len(row.token_ids)) for row in p.rows] for p in prefills(driver)]
    assert packed == [[(0, 6), (1, 6), (2, 4)], [(2, 2), (3, 6)]]


def test_many_small_prompts_take_a_bucket_with_enough_rows():
    buckets = make_buckets(num_slots=16, prefill_tokens=(64, 512))
    driver = Driver(buckets)
    driver.add(*(make_request(i, 1, 1) for i in range(12)))
    driver.run()
    # 12 tokens would fit 64, but a prefill of 64 has 8 rows.
    (plan,) = prefills(driver)
    assert plan.num_tokens == 512 and len(plan.rows) == 12


def test_prefill_fills_its_bucket_and_the_rest_goes_with_the_next():
    """1,500 tokens would leave 2,596 places of 4,096 empty."""
    buckets = make_buckets(prefill_tokens=(64, 1024, 4096))
    driver = Driver(buckets, num_pages=2000)
    driver.add(make_request(0, 4, 200))
    driver.step()
    driver.add(*(make_request(i, 500, 40) for i in range(1, 4)))
    for _ in range(3):
        driver.step()
    assert kinds(driver) == "ppdp"
    sizes = [
        (plan.num_tokens, sum(len(r.token_ids) for r in plan.rows)) for plan in prefills(driver)
    ]
    # The rest waits for a window: alone it would not be worth another prefill.
    assert sizes[1:] == [(1024, 1024), (1024, 476)] or sizes[1:] == [(1024, 1024), (64, 64)]
    driver.run()


@pytest.mark.parametrize(
    ("num_tokens", "num_rows", "size"),
    [
        (1, 1, 64),
        (64, 8, 64),
        (64, 9, 1024),  # 256 has eight rows, too
        (300, 1, 256),
        (700, 1, 256),
        (900, 1, 1024),
        (5000, 10, 4096),
        (9000, 20, 8192),
        (5120, 256, 8192),  # of 4,096 tokens 205 rows would be full, and there are 128
    ],
)
def test_bucket_of_a_full_prefill(num_tokens: int, num_rows: int, size: int):
    buckets = make_buckets(num_slots=256, prefill_tokens=(64, 256, 1024, 2048, 4096, 8192))
    assert buckets.full_prefill(num_tokens, num_rows) == size


def test_prefill_takes_no_more_rows_than_its_program_has():
    driver = Driver(make_buckets(num_slots=16, prefill_tokens=(64,)))
    driver.add(*(make_request(i, 1, 1) for i in range(12)))
    driver.run()
    assert [len(plan.rows) for plan in prefills(driver)] == [8, 4]


def test_prompts_do_not_stall_a_stream():
    driver = Driver(make_buckets(prefill_tokens=(16,)))
    driver.add(make_request(0, 4, 200, is_streaming=True))
    for _ in range(3):
        driver.step()
    driver.add(*(make_request(i, 60, 1) for i in range(1, 5)))
    driver.run()
    assert "pp" not in kinds(driver)


def test_gap_of_a_stream_is_at_most_a_window_and_a_chunk():
    """However long the prompts are that arrive, and however many."""
    sizes = (64, 1024, 2048, 8192)
    driver = Driver(make_buckets(prefill_tokens=sizes, page_size=64), num_pages=600)
    driver.add(make_request(0, 4, 80, is_streaming=True))
    for _ in range(3):
        driver.step()
    before = len(driver.runner.plans)
    driver.add(*(make_request(i, 5000, 20) for i in range(1, 3)))
    while 0 not in driver.endings:
        driver.step()
    plans = driver.runner.plans[before:]
    rounds = "".join("p" if isinstance(p, PrefillPlan) else "d" for p in plans).split("d")
    assert max(map(len, rounds)) == 1
    assert max(p.num_tokens for p in plans if isinstance(p, PrefillPlan)) == STREAM_CHUNK_TOKENS
    steps = [p.num_steps for p in plans if isinstance(p, DecodePlan)]
    assert max(steps) < 2 * STREAM_WINDOW_STEPS
    driver.run()


def test_prompts_come_first_when_nobody_streams():
    driver = Driver(make_buckets(prefill_tokens=(16,)))
    driver.add(make_request(0, 4, 200))
    for _ in range(3):
        driver.step()
    before = len(driver.runner.plans)
    driver.add(make_request(1, 60, 1))
    driver.run()
    assert kinds(driver)[before:].startswith("pppp")


@pytest.mark.parametrize("running, first", [(0, "pp"), (3, "pd")])
def test_half_of_a_burst_does_not_wait_for_a_window(running: int, first: str):
    """Its first half fills a bucket; the second comes next unless more would wait for it."""
    driver = Driver(make_buckets(num_slots=16, prefill_tokens=(256, 1024, 8192)), num_pages=2000)
    driver.add(*(make_request(i, 4, 60) for i in range(running)))
    while running and "d" not in kinds(driver):
        driver.step()
    before = len(driver.runner.plans)
    driver.add(*(make_request(10 + i, 128, 60) for i in range(4)))
    driver.run()
    assert kinds(driver)[before:].startswith(first)


def test_prompts_that_never_cease_starve_nobody():
    driver = Driver(make_buckets(), num_pages=200)
    driver.add(make_request(0, 4, 200))
    for seq_id in range(1, 400):
        if 0 in driver.endings:
            break
        driver.add(make_request(seq_id, 60, 1))
        driver.step()
    in_a_row = [len(row) for row in kinds(driver).split("d")]
    assert len(driver.tokens[0]) == 200 and max(in_a_row) == MAX_PREFILLS_IN_A_ROW
    driver.run()


# Windows


@pytest.mark.parametrize("max_new_tokens", [2, 8, 9, 17, 30, 128])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_window_is_never_longer_than_what_is_left(max_new_tokens: int, is_streaming: bool):
    driver = Driver(make_buckets())
    driver.add(make_request(0, 3, max_new_tokens, is_streaming=is_streaming))
    driver.run()
    steps = [plan.num_steps for plan in windows(driver)]
    assert sum(steps) == max_new_tokens - 1
    if is_streaming:
        assert max(steps) < 2 * STREAM_WINDOW_STEPS
        assert min(steps) >= min(STREAM_WINDOW_STEPS, max_new_tokens - 1)
    else:
        assert steps[:-1] == [32] * (len(steps) - 1)


def test_window_is_short_while_someone_streams_or_waits_for_a_slot():
    driver = Driver(make_buckets(num_slots=2))
    driver.add(make_request(0, 3, 120), make_request(1, 3, 21))
    driver.step()
    driver.add(make_request(2, 3, 5))
    driver.step()
    # The next slot is free after 20 more tokens: the window ends there.
    assert windows(driver)[-1].num_steps == 20
    driver.run()
    streamed = Driver(make_buckets())
    streamed.add(make_request(0, 3, 120), make_request(1, 3, 120, is_streaming=True))
    streamed.run()
    assert max(plan.num_steps for plan in windows(streamed)) < 2 * STREAM_WINDOW_STEPS


def test_window_shrinks_before_anyone_is_preempted():
    # 6 pages of 4; the two prompts take 2 each, and each row may grow by one page.
    driver = Driver(make_buckets(), num_pages=7)
    driver.add(make_request(0, 5, 8), make_request(1, 5, 8))
    driver.run()
    assert driver.scheduler.stats.num_retractions == 0
    assert [plan.num_steps for plan in windows(driver)] == [7]
    tight = Driver(make_buckets(max_window_steps=6), num_pages=9)
    tight.add(make_request(0, 5, 20), make_request(1, 5, 20))
    tight.run()
    steps = [plan.num_steps for plan in windows(tight)]
    assert min(steps) < 6 and tight.scheduler.stats.num_retractions == 1


# Pages, slots, shapes


@pytest.mark.parametrize(
    ("prompt_len", "max_new_tokens", "num_pages"), [(4, 1, 1), (5, 1, 2), (4, 2, 2), (3, 2, 1)]
)
def test_the_last_token_takes_no_page(prompt_len: int, max_new_tokens: int, num_pages: int):
    driver = Driver(make_buckets())
    driver.add(make_request(0, prompt_len, max_new_tokens))
    driver.run()
    pages = [page for plan in driver.runner.plans for page in plan.page_writes.pages]
    assert len(pages) == num_pages


def test_more_requests_than_slots_run_in_order():
    driver = Driver(make_buckets(num_slots=3))
    driver.add(*(make_request(i, 5, 10) for i in range(20)))
    driver.run()
    started = [row.request.seq_id for plan in prefills(driver) for row in plan.new_rows]
    assert started == list(range(20)) == driver.finish_order


def test_head_of_the_queue_is_not_overtaken():
    driver = Driver(make_buckets(), num_pages=11)
    driver.add(make_request(0, 20, 10), make_request(1, 30, 5), make_request(2, 1, 1))
    driver.run()
    started = [row.request.seq_id for plan in prefills(driver) for row in plan.new_rows]
    assert started == [0, 1, 2]


def test_a_compiled_size_is_preferred_to_a_smaller_one():
    ready = {("prefill", 64), ("decode", 8)}
    driver = Driver(make_buckets(), is_ready=lambda *key: key in ready)
    driver.add(make_request(0, 3, 5))
    driver.run()
    assert {p.num_tokens for p in prefills(driver)} == {64}
    assert {p.num_rows for p in windows(driver)} == {8}


def test_the_smallest_size_is_waited_for_when_none_is_compiled():
    driver = Driver(make_buckets(), is_ready=lambda kind, size: False)
    driver.add(make_request(0, 3, 5))
    driver.run()
    assert {p.num_tokens for p in prefills(driver)} == {16}
    assert {p.num_rows for p in windows(driver)} == {1}


def test_preempted_sequence_keeps_its_slot_and_is_prefilled_without_drawing():
    # Two texts of 11 pages each; the first takes the last of 12 from the second.
    driver = Driver(make_buckets(max_window_steps=4), num_pages=13)
    driver.add(make_request(0, 4, 40), make_request(1, 4, 40))
    driver.run()
    assert driver.endings[1].num_retractions == 1
    first, again = prefills(driver)
    (row,) = again.rows
    assert row.slot == first.rows[1].slot and not row.draws
    assert first.new_rows and again.new_rows == []
    # It brings the whole page table, and computes no page that is still cached.
    _, indices, pages = again.page_writes
    assert indices == list(range(len(pages)))
    assert row.start % 4 == 0 and row.start + len(row.token_ids) <= 4 * len(pages)


def test_what_is_in_flight_is_read_before_anyone_is_preempted():
    """The first window takes all pages; the first request ends in it, so nobody need go."""
    driver = Driver(make_buckets(), num_pages=13)
    driver.add(make_request(0, 4, 9), make_request(1, 4, 40))
    driver.run()
    assert kinds(driver) == "pdd" and driver.scheduler.stats.num_retractions == 0


def test_prefill_after_preemption_leaves_out_the_last_token():
    sequence = Sequence(request=make_request(0, 4, 9))
    assert sequence.prefill_len(sequence.leader) == 4
    sequence.output_ids.extend([7, 8, 9])
    assert sequence.prefill_len(sequence.leader) == 6
    text = sequence.text(sequence.leader)
    assert text.tolist() == [*sequence.request.prompt_ids, 7, 8, 9] and text.dtype == np.int32


# Companions


def with_companions(seq_id: int, prompt_len: int, *lens: int, **kwargs: Any) -> SequenceRequest:
    companions = tuple(
        make_request(1000 * (seq_id + 1) + i, length, 0) for i, length in enumerate(lens)
    )
    return make_request(seq_id, prompt_len, companions=companions, **kwargs)


def test_companions_decode_beside_their_leader_from_the_first_token_on():
    driver = Driver(make_buckets(prefill_tokens=(16,)))
    driver.add(make_request(7, 5, 30), with_companions(0, 10, 1, 20, max_new_tokens=20))
    driver.run()
    rows = [row for plan in prefills(driver) for row in plan.rows if row.seq_id != 7]
    assert not any(row.draws for row in rows)
    computed = {i: sum(len(r.token_ids) for r in rows if r.seq_id == i) for i in (0, 1000, 1001)}
    assert computed == {0: 9, 1000: 1, 1001: 19}
    groups = [[(r.seq_id, r.member) for r in plan.rows] for plan in windows(driver)]
    assert any(len(group) == 4 for group in groups)
    for group in groups:
        places = [place for place in group if place[0] != 7]
        assert places in ([], [(0, 0), (1000, 1), (1001, 2)])
    assert set(driver.endings) == {0, 7}


def test_companions_start_together_or_not_at_all():
    driver = Driver(make_buckets(num_slots=4))
    driver.add(make_request(0, 5, 60), with_companions(1, 5, 5, 5, 5, max_new_tokens=4))
    driver.run()
    assert driver.finish_order == [0, 1]
    short = Driver(make_buckets(max_window_steps=2), num_pages=12)
    short.add(make_request(0, 20, 20), with_companions(1, 9, 9, 9, max_new_tokens=4))
    short.run()
    assert short.finish_order == [0, 1]


def test_companions_are_preempted_and_come_back_together():
    driver = Driver(make_buckets(max_window_steps=4), num_pages=22)
    driver.add(make_request(0, 4, 60), with_companions(1, 4, 6, max_new_tokens=24))
    driver.run()
    assert driver.endings[1].num_retractions > 0
    again = [plan.seq_ids for plan in prefills(driver)][1:]
    assert again and all(ids == [1, 2000] for ids in again)


def test_limit_of_no_token_ends_companions_too():
    driver = Driver(make_buckets())
    driver.add(with_companions(0, 4, 6, max_new_tokens=0))
    driver.run()
    assert driver.endings[0].finish == StopReason("length", length=0)


# Logprobs of the prompt


@pytest.mark.parametrize("start", [0, 1, 5, 16, 49, 50])
def test_prompt_logprobs_come_once_for_every_token_from_the_first_wanted(start: int):
    driver = Driver(make_buckets(prefill_tokens=(16,)))
    driver.add(make_request(0, 50, 3, logprob_start=start))
    driver.run()
    targets = [row.targets for plan in prefills(driver) for row in plan.rows]
    wanted = np.concatenate([t[t != -1] for t in targets if t is not None] or [np.zeros(0)])
    assert wanted.tolist() == driver.requests[0].prompt_ids[max(1, start) :].tolist()


def test_prompt_logprobs_are_not_brought_again_after_a_preemption():
    driver = Driver(make_buckets(max_window_steps=4), num_pages=13, has_prefix_cache=False)
    driver.add(make_request(0, 4, 40), make_request(1, 10, 30, logprob_start=0))
    driver.run()
    assert driver.endings[1].num_retractions > 0
    assert len(driver.prompt_logprobs[1]) == 9


def test_prompt_logprobs_lost_with_a_failed_step_are_brought_again():
    driver = Driver(make_buckets(prefill_tokens=(4,)), faults={2: "result"})
    driver.add(make_request(0, 4, 10), make_request(1, 10, 3, logprob_start=0))
    driver.run()
    failed = {i for plan in driver.runner.failed for i in plan.seq_ids}
    assert failed == {1} or len(driver.prompt_logprobs[1]) == 9


# Integrity


def test_integrity_check_finds_a_lost_slot():
    driver = Driver(make_buckets())
    driver.add(make_request(0, 4, 9))
    driver.step()
    driver.scheduler._roster._free_slots.pop()
    with pytest.raises(AssertionError, match="slots"):
        driver.scheduler.check_integrity()
