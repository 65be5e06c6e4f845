"""Plans as packed arrays: what goes in comes out, and what does not fit takes the long way."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.runtime import batch
from jaxengine.runtime.batch import DROPPED, Edits, Packing
from jaxengine.runtime.slots import SlotLayout
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.plan import (
    DecodePlan,
    DecodeRow,
    NewRow,
    PageWrite,
    PrefillPlan,
    PrefillRow,
)
from jaxengine.types import Param, SequenceRequest

BUCKETS = Buckets(
    decode_rows=(1, 4, 8),
    prefill_tokens=(32, 256),
    num_pages=(16,),
    num_slots=8,
    page_size=16,
    max_window_steps=32,
)
PARAMS = {
    "temperature": Param("float32", 1.0),
    "bias_ids": Param("int32", (), shape=(300,), pad=-1),
}
LAYOUT = SlotLayout(PARAMS, pages_per_sequence=16)


def unpack(packing: Packing, packed: np.ndarray) -> dict[str, list[int]]:
    parts = packing.unpack(jnp.asarray(packed))
    return {name: np.asarray(part).tolist() for name, part in parts.items()}


def new_row(slot: int, num_biases: int = 0, output_ids: tuple[int, ...] = ()) -> NewRow:
    request = SequenceRequest(
        seq_id=slot,
        rid="a",
        prompt_ids=np.arange(3, dtype=np.int32),
        max_new_tokens=9,
        seed=(slot + 1) << 40,
        values={"temperature": 0.25 * slot, "bias_ids": list(range(num_biases))},
    )
    return NewRow(slot, request, output_ids)


def chunk(slot: int, start: int, count: int, draws: bool = True) -> PrefillRow:
    return PrefillRow(slot, slot, np.arange(start, start + count, dtype=np.int32), start, draws)


def prefill_plan(*rows: PrefillRow, num_tokens: int = 32, **kwargs: Any) -> PrefillPlan:
    return PrefillPlan(num_tokens=num_tokens, num_pages=16, rows=list(rows), **kwargs)


def decode_plan(*slots: int, num_rows: int = 4, **kwargs: Any) -> DecodePlan:
    rows = [DecodeRow(slot, slot) for slot in slots]
    return DecodePlan(num_rows=num_rows, num_pages=16, num_steps=17, rows=rows, **kwargs)


def apply(table: np.ndarray, segments: dict[str, list[int]]) -> np.ndarray:
    """The slot table after the edits, as the head of a step makes them."""
    slots = jnp.asarray(table)
    if "resets" in segments:
        resets = jnp.asarray(segments["resets"])
        slots = slots.at[resets].set(jnp.asarray(LAYOUT.default_row), mode="drop")
    cells, values = jnp.asarray(segments["cells"]), jnp.asarray(segments["cell_values"])
    flat = slots.reshape(-1).at[cells].set(values, mode="drop")
    return np.asarray(flat.reshape(slots.shape))


def garbage_table(num_slots: int = BUCKETS.num_slots) -> np.ndarray:
    return np.full((num_slots, LAYOUT.width), -9, np.int32)


# Packing


SIZES = {"a": 3, "b": 0, "c": 1, "d": 7}
INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.fixed_dictionaries({k: st.lists(INT32, max_size=n) for k, n in SIZES.items()}))
@settings(deadline=None)
def test_pack_and_unpack_are_inverse(values: dict[str, list[int]]):
    packing, fill = Packing(SIZES), {"c": 5, "d": -1}
    packed = packing.pack(fill, {name: np.asarray(v, np.int32) for name, v in values.items()})
    assert packed.dtype == np.int32 and len(packed) == packing.size == 11
    wanted = {k: v + [fill.get(k, 0)] * (SIZES[k] - len(v)) for k, v in values.items()}
    assert unpack(packing, packed) == wanted


def test_length_of_a_segment():
    packing = Packing({"a": 3, "b": 0})
    assert (packing.length("a"), packing.length("b"), packing.length("none")) == (3, 0, 0)


# Prefill


def test_prefill_is_packed():
    plan = prefill_plan(
        chunk(5, 0, 3),
        chunk(2, 8, 4, draws=False),
        chunk(7, 1, 1),
        new_rows=[new_row(5), new_row(7, output_ids=(1, 2))],
        page_writes=[PageWrite(5, 0, 33), PageWrite(2, 1, 44)],
    )
    edits = batch.collect_edits(LAYOUT, plan.new_rows, plan.page_writes)
    packed = batch.pack_prefill(plan, BUCKETS, edits)
    assert packed is not None
    got = unpack(batch.prefill_packing(BUCKETS, 32), packed)
    assert got["token_ids"] == [0, 1, 2, 8, 9, 10, 11, 1] + [0] * 24
    assert got["slot_ids"] == [5, 2, 7] + [DROPPED] * 5
    assert got["q_starts"] == [0, 3, 7, 8] + [8] * 5
    assert got["kv_lens"] == [3, 12, 2] + [0] * 5
    assert got["draws"] == [1, 0, 1] + [0] * 5
    # A sequence that comes back keeps its sampler state, so it is not new.
    assert got["is_new"] == [1] + [0] * 7
    assert got["resets"] == [5, 7] + [DROPPED] * 6

    table = apply(garbage_table(), got)
    pages = LAYOUT.columns["page_table"].start
    assert table[5, pages] == 33 and table[2, pages + 1] == 44
    assert (table[[0, 1, 3, 4, 6]] == -9).all()
    assert np.count_nonzero(table[2] != -9) == 1
    wanted = LAYOUT.default_row.copy()
    cells, values = LAYOUT.cells(new_row(7, output_ids=(1, 2)))
    wanted[cells - 7 * LAYOUT.width] = values
    assert table[7].tolist() == wanted.tolist()


def test_prefill_may_fill_its_bucket():
    plan = prefill_plan(*(chunk(slot, 0, 4) for slot in range(8)))
    packed = batch.pack_prefill(plan, BUCKETS, batch.NO_EDITS)
    assert packed is not None
    got = unpack(batch.prefill_packing(BUCKETS, 32), packed)
    assert got["q_starts"] == list(range(0, 33, 4))
    assert got["slot_ids"] == list(range(8)) and got["resets"] == [DROPPED] * 8


# Decode


def test_decode_is_packed():
    plan = decode_plan(6, 0, 3, page_writes=[PageWrite(0, 2, 9)])
    packed = batch.pack_decode(plan, BUCKETS, batch.collect_edits(LAYOUT, [], plan.page_writes))
    assert packed is not None
    got = unpack(batch.decode_packing(BUCKETS, 4), packed)
    assert got["num_steps"] == [17]
    assert got["slot_ids"] == [6, 0, 3, DROPPED]
    table = apply(garbage_table(), got)
    assert table[0, LAYOUT.columns["page_table"].start + 2] == 9
    assert np.count_nonzero(table != -9) == 1


@pytest.mark.parametrize("num_rows", BUCKETS.decode_rows)
def test_decode_has_room_for_all_pages_of_a_window(num_rows: int):
    # A window of 32 that starts on the last place of a page of 16 takes two pages more.
    writes = [PageWrite(slot, i, 1 + i) for slot in range(num_rows) for i in range(2)]
    plan = decode_plan(*range(num_rows), num_rows=num_rows, page_writes=writes)
    edits = batch.collect_edits(LAYOUT, [], writes)
    assert batch.pack_decode(plan, BUCKETS, edits) is not None


def test_decode_that_overflows_is_not_packed():
    writes = [PageWrite(0, i, 1 + i) for i in range(BUCKETS.page_writes(1) + 1)]
    edits = batch.collect_edits(LAYOUT, [], writes)
    plan = decode_plan(0, num_rows=1, page_writes=writes)
    assert batch.pack_decode(plan, BUCKETS, edits) is None
    assert batch.pack_decode(plan, BUCKETS, batch.NO_EDITS) is not None


def test_decode_has_no_room_for_resets():
    edits = batch.collect_edits(LAYOUT, [new_row(0)], [])
    assert batch.pack_decode(decode_plan(0), BUCKETS, edits) is None


# Overflow


def test_prefill_that_overflows_gives_the_same_table_in_pieces():
    rows = [new_row(slot, num_biases=40 * slot) for slot in range(8)]
    writes = [PageWrite(slot, i, 1 + 16 * slot + i) for slot in range(8) for i in range(3)]
    plan = prefill_plan(*(chunk(i, 0, 2) for i in range(8)), new_rows=rows, page_writes=writes)
    edits = batch.collect_edits(LAYOUT, rows, writes)
    assert batch.pack_prefill(plan, BUCKETS, edits) is None
    whole = apply(garbage_table(), {name: v.tolist() for name, v in edits._asdict().items()})
    assert apply_pieces(garbage_table(), edits).tolist() == whole.tolist()
    packed = batch.pack_prefill(plan, BUCKETS, batch.NO_EDITS)
    assert packed is not None
    got = unpack(batch.prefill_packing(BUCKETS, 32), packed)
    assert got["is_new"] == [1] * 8
    assert apply(whole, got).tolist() == whole.tolist()


def apply_pieces(table: np.ndarray, edits: Edits) -> np.ndarray:
    packing = batch.admit_packing()
    for piece in batch.split_edits(edits):
        table = apply(table, unpack(packing, batch.pack_edits(piece)))
    return table


def test_edits_beyond_one_admission_give_the_same_table():
    num_slots = batch.ADMIT_ROWS + 44
    rows = [new_row(slot, num_biases=200) for slot in range(num_slots)]
    writes = [PageWrite(slot, i, 1 + i) for slot in range(num_slots) for i in range(3)]
    edits = batch.collect_edits(LAYOUT, rows, writes)
    assert len(edits.resets) > batch.ADMIT_ROWS and len(edits.cells) > 3 * batch.ADMIT_CELLS
    whole = apply(
        garbage_table(num_slots), {name: v.tolist() for name, v in edits._asdict().items()}
    )
    assert np.array_equal(apply_pieces(garbage_table(num_slots), edits), whole)


def test_resets_come_before_any_cell():
    rows = [new_row(slot, num_biases=100) for slot in range(300)]
    pieces = batch.split_edits(batch.collect_edits(LAYOUT, rows, []))
    has_resets = [len(piece.resets) > 0 for piece in pieces]
    assert has_resets == sorted(has_resets, reverse=True) and sum(has_resets) == 2
    assert not any(len(piece.resets) and len(piece.cells) for piece in pieces)


def test_no_edits_take_no_admission():
    assert batch.split_edits(batch.NO_EDITS) == []
    edits = batch.collect_edits(LAYOUT, [], [])
    assert [len(part) for part in edits] == [0, 0, 0]
