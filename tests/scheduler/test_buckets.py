"""Sizes derived from the buckets."""

from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.driver import make_buckets

SIZES = st.integers(1, 5000)


@given(SIZES, SIZES, st.integers(1, 512))
def test_prefill_rows_grow_with_the_tokens(a: int, b: int, num_slots: int):
    buckets = make_buckets(num_slots=num_slots)
    small, large = (buckets.prefill_rows(n) for n in sorted((a, b)))
    assert 1 <= small <= large <= num_slots
    assert small <= min(a, b)


@given(st.integers(0, 200), st.integers(1, 64), st.integers(1, 64))
def test_page_writes_hold_any_window(num_tokens: int, num_steps: int, page_size: int):
    buckets = make_buckets(page_size=page_size, max_window_steps=num_steps)
    have, need = (-(-n // page_size) for n in (num_tokens, num_tokens + num_steps))
    assert need - have <= buckets.page_writes(1)
