"""Every page has one owner or is free, and misuse is caught where it happens."""

import pytest

from jaxengine.scheduler.page_pool import PagePool
from jaxengine.types import NULL_PAGE


def test_all_pages_but_the_null_page_are_handed_out():
    pool = PagePool(8)
    assert pool.num_free == pool.capacity == 7
    pages = pool.allocate(7)
    assert sorted(pages) == list(range(1, 8)) and NULL_PAGE not in pages
    assert pool.num_free == 0
    pool.check_integrity([pages[:3], pages[3:]])
    pool.free(pages)
    assert pool.num_free == 7
    pool.check_integrity([])


def test_freed_pages_are_reused_last():
    pool = PagePool(5)
    first = pool.allocate(2)
    pool.free(first)
    assert pool.allocate(4)[-2:] == first


def test_nothing_may_be_allocated_and_freed():
    pool = PagePool(2)
    assert pool.allocate(0) == []
    pool.free([])
    pool.check_integrity([])


def test_overdraft_is_refused_and_takes_nothing():
    pool = PagePool(4)
    with pytest.raises(AssertionError, match="overdrawn"):
        pool.allocate(4)
    assert pool.num_free == 3


@pytest.mark.parametrize("page", [NULL_PAGE, 2, 99])
def test_free_of_a_page_nobody_holds_is_refused(page: int):
    pool = PagePool(4)
    held = pool.allocate(1)
    with pytest.raises(AssertionError, match=f"page {page} is freed"):
        pool.free([page])
    pool.check_integrity([held])


def test_page_freed_twice_is_refused():
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.free(pages)


@pytest.mark.parametrize(
    ("owned", "message"),
    [
        ([[1, 2], [2]], "two owners"),
        ([[1]], "leaked or lost"),
        ([[1, 2, 3]], "leaked or lost"),
        ([[1], [3]], "leaked or lost"),
    ],
)
def test_integrity_check_names_what_is_wrong(owned: list[list[int]], message: str):
    pool = PagePool(6)
    assert pool.allocate(2) == [1, 2]
    pool.check_integrity([[1], [2]])
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(owned)


def test_integrity_check_counts_the_free_pages():
    pool = PagePool(6)
    pool._free.append(5)
    with pytest.raises(AssertionError, match="add up"):
        pool.check_integrity([])
