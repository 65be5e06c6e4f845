"""What a step keeps on the device."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.runtime import batch
from jaxengine.runtime.state import COUNT_DTYPE, Cursor, count_tokens

NUM_SLOTS, VOCAB = 3, 5


@pytest.mark.parametrize(
    "slot_ids, tokens, is_counted",
    [
        ([1], [4], [True]),
        ([2], [0], [False]),
        ([batch.DROPPED], [4], [False]),  # no real row
        ([0], [-1], [False]),  # a failed row is done
        ([2, 0, batch.DROPPED], [4, 4, 4], [True, False, False]),
    ],
)
def test_counts_grow_where_tokens_count(
    slot_ids: list[int], tokens: list[int], is_counted: list[bool]
):
    before = np.arange(NUM_SLOTS * VOCAB).reshape(NUM_SLOTS, VOCAB)
    want = before.copy()
    for slot, token, counts in zip(slot_ids, tokens, is_counted, strict=True):
        if counts:
            want[slot, token] += 1
    args = [jnp.asarray(values) for values in (slot_ids, tokens, is_counted)]
    got = count_tokens(jnp.asarray(before, COUNT_DTYPE), *args, unique=True)
    np.testing.assert_array_equal(got, want)


def test_a_cursor_is_what_was_packed():
    columns = ([7, -1], [3, 40], [0, 9], [False, True])
    cursor = Cursor(*map(jnp.asarray, columns))
    for column, want in zip(Cursor.unpack(cursor.pack()), columns, strict=True):
        np.testing.assert_array_equal(column, want)
