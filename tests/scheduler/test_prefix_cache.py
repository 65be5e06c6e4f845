"""What is cached is not computed again: counts, sharing, eviction, namespaces."""

import numpy as np
import pytest

from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.prefix_cache import PrefixCache
from jaxengine.scheduler.scheduler import Scheduler
from jaxengine.types import SequenceRequest
from tests.fake_runner import make_request, oracle
from tests.scheduler.driver import Driver, make_buckets

PAGE = 4


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, length).tolist()


def ask(seq_id: int, prompt_ids: list[int], max_new_tokens: int = 5, **others) -> SequenceRequest:
    return make_request(seq_id, 0, max_new_tokens, prompt_ids=prompt_ids, **others)


def computed(driver: Driver, *requests: SequenceRequest) -> int:
    """Prompt tokens computed for these; `cached_tokens` says which were not."""
    before = driver.scheduler.stats.num_prefill_tokens
    driver.add(*requests)
    driver.run()
    count = driver.scheduler.stats.num_prefill_tokens - before
    cached = sum(driver.endings[r.seq_id].cached_tokens for r in requests)
    assert count + cached == sum(len(r.prompt_ids) for r in requests)
    return count


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 40, 41])
def test_second_identical_prompt_computes_its_last_page_only(length: int):
    driver = Driver(make_buckets())
    assert computed(driver, ask(0, text(length))) == length
    # At least one token is computed: it is what the first one is drawn from.
    assert computed(driver, ask(1, text(length))) == length - (length - 1) // PAGE * PAGE


def test_shared_system_prompt_is_computed_once():
    driver = Driver(make_buckets(prefill_tokens=(64, 512)), num_pages=2000)
    requests = [ask(i, text(1000) + text(7, seed=i + 1)) for i in range(100)]
    assert computed(driver, *requests) == 1000 + 100 * 7
    assert driver.core.stats()["cache_hit_rate"] == pytest.approx(99 * 1000 / 100_700)


def test_equal_prompts_that_arrive_together_share_all_but_the_last_page():
    driver = Driver(make_buckets(num_slots=16, prefill_tokens=(256,)))
    samples = [ask(i, text(21), seed=i) for i in range(8)]
    assert computed(driver, *samples) == 21 + 7 * 1
    assert driver.scheduler.stats.num_prefills == 2


def test_samples_of_many_prompts_are_packed():
    """The first of each prompt go together, the others after them: two prefills, not ten."""
    driver = Driver(make_buckets(num_slots=32, prefill_tokens=(1024,)))
    samples = [ask(4 * p + i, text(21, seed=p), seed=i) for p in range(5) for i in range(4)]
    assert computed(driver, *samples) == 5 * (21 + 3 * 1)
    assert driver.scheduler.stats.num_prefills == 2


def test_long_prompt_is_followed_by_its_twin_chunk_after_chunk():
    driver = Driver(make_buckets(prefill_tokens=(16,)))
    assert computed(driver, ask(0, text(100)), ask(1, text(100)), ask(2, text(9, 1))) == 100 + 4 + 9


def test_chat_tree_computes_only_what_each_turn_adds():
    """Outputs are cached, too; of each turn the last token drawn is not, for it was never fed."""
    driver = Driver(make_buckets())
    root = ask(0, text(10), 7)
    assert computed(driver, root) == 10
    said = text(10) + oracle(root).token_ids
    left, right = ask(1, said + text(6, 1), 5), ask(2, said + text(9, 2), 5)
    assert computed(driver, left) == 23 - 16 and computed(driver, right) == 26 - 16
    deeper = ask(3, [*left.prompt_ids.tolist(), *oracle(left).token_ids, *text(3, 3)])
    assert computed(driver, deeper) == 31 - 24
    assert computed(driver, ask(4, deeper.prompt_ids.tolist()[:20])) == 20 - 16


def test_least_recently_used_leaf_is_evicted_first():
    # 12 pages; each text fills 3, and its request takes one page more while it runs.
    driver = Driver(make_buckets(), num_pages=13)
    for seq_id in range(3):
        assert computed(driver, ask(seq_id, text(12, seq_id), 2)) == 12
    assert computed(driver, ask(3, text(12, 0), 2)) == 4  # used again
    assert computed(driver, ask(4, text(12, 7), 2)) == 12  # takes what was used least
    assert computed(driver, ask(5, text(12, 0), 2)) == 4
    assert computed(driver, ask(6, text(12, 1), 2)) > 4
    driver.check()


def test_cached_pages_go_before_anyone_is_preempted():
    driver = Driver(make_buckets(), num_pages=21)
    for seq_id in range(5):
        computed(driver, ask(seq_id, text(16, seq_id)))
    assert driver.scheduler.num_cached_pages > 15
    driver.add(ask(10, text(8, 10), 30), ask(11, text(8, 11), 30))
    driver.run()
    assert driver.scheduler.stats.num_retractions == 0


def test_namespaces_share_nothing():
    driver = Driver(make_buckets())
    for seq_id, salt in enumerate([None, "a", ("a", "v2"), "b"]):
        assert computed(driver, ask(seq_id, text(20), cache_namespace=salt)) == 20
    assert computed(driver, ask(9, text(20), cache_namespace="a")) == 4


def test_flush_forgets_all_also_what_is_in_use():
    driver = Driver(make_buckets())
    computed(driver, ask(0, text(20)))
    driver.add(ask(1, text(20), 100))
    for _ in range(3):
        driver.step()
    driver.scheduler.flush_cache()
    driver.check()
    driver.add(ask(2, text(20)))
    driver.run()
    assert driver.endings[1].cached_tokens == 16 and driver.endings[2].cached_tokens == 0
    driver.scheduler.flush_cache()
    assert driver.pool.num_free == driver.pool.capacity


def test_no_prefix_cache_computes_everything():
    driver = Driver(make_buckets(), has_prefix_cache=False)
    assert computed(driver, ask(0, text(20)), ask(1, text(20))) == 40
    assert computed(driver, ask(2, text(20))) == 20
    assert driver.pool.num_free == driver.pool.capacity


@pytest.mark.parametrize(("start", "num_computed"), [(0, 40), (1, 40), (20, 24), (21, 20), (40, 4)])
def test_prompt_logprobs_are_computed_from_the_first_one_wanted(start: int, num_computed: int):
    driver = Driver(make_buckets())
    computed(driver, ask(0, text(40)))
    assert computed(driver, ask(1, text(40), logprob_start=start)) == num_computed
    assert len(driver.prompt_logprobs[1]) == 40 - max(1, start)


def test_failed_step_leaves_nothing_cached():
    driver = Driver(make_buckets(), faults={1: "result"})
    driver.add(ask(0, text(20)))
    driver.run()
    assert driver.scheduler.num_cached_pages == 0
    assert computed(driver, ask(1, text(20))) == 20


def test_comeback_is_served_from_the_cache():
    driver = Driver(make_buckets())
    driver.add(ask(0, text(20), 60))
    for _ in range(3):
        driver.step()
    driver.receive(driver.core.pause(keeps_pages=False))
    known = 20 + len(driver.tokens[0])
    driver.core.resume()
    before = driver.scheduler.stats.num_prefill_tokens
    driver.run()
    # Of `known - 1` tokens in the pages, those on full ones were found again.
    assert driver.scheduler.stats.num_prefill_tokens - before <= PAGE
    assert known > 40


# The cache alone


def test_page_is_kept_while_anyone_holds_it():
    pool = PagePool(4)
    cache = PrefixCache(pool, 2)
    tokens = np.arange(6, dtype=np.int32)
    pages = cache.allocate(3)
    prefix = cache.extend(cache.match(None, tokens, 6).prefix, tokens, pages, 6)
    match = cache.match(None, tokens, 5)
    assert match.pages == pages[:2] and match.num_unused == 0
    cache.hold(match.prefix)
    cache.release(prefix, tokens, pages, 6)
    assert cache.num_available == 1
    assert cache.allocate(1) == [pages[2]]
    cache.release(match.prefix, tokens, match.pages, 4)
    assert cache.num_available == 2 and cache.match(None, tokens, 6).num_unused == 2


def test_page_computed_twice_is_kept_once():
    pool = PagePool(9)
    cache = PrefixCache(pool, 2)
    tokens = np.arange(4, dtype=np.int32)
    root = cache.match(None, tokens, 0).prefix
    first, second = cache.allocate(2), cache.allocate(2)
    one = cache.extend(root, tokens, first, 4)
    two = cache.extend(root, tokens, second, 4)
    assert two == root  # it goes on with its own
    cache.check_integrity([(one, first), (two, second)])
    cache.release(two, tokens, second, 4)
    cache.release(one, tokens, first, 4)
    assert cache.num_cached == 2 and pool.num_free == 6
    cache.check_integrity([])


def test_integrity_check_finds_a_wrong_count():
    cache = PrefixCache(PagePool(9), 2)
    tokens = np.arange(4, dtype=np.int32)
    pages = cache.allocate(2)
    prefix = cache.extend(cache.match(None, tokens, 0).prefix, tokens, pages, 4)
    cache.check_integrity([(prefix, pages)])
    with pytest.raises(AssertionError):
        cache.check_integrity([])


def test_scheduler_takes_thousands_who_wait():
    """Planning looks past no more than it must: it stays far below the time of a step."""
    scheduler = Scheduler(make_buckets(num_slots=4), PagePool(1000))
    for i in range(2_000):
        scheduler.add(ask(i, [i % 64] * 9))
    plan = scheduler.schedule()
    assert plan is not None and len(plan.rows) == 4
    assert scheduler.num_waiting == 1_996
