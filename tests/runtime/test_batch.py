"""Plans as packed arrays: what goes in comes out, and what does not fit takes the long way."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.runtime import batch
from jaxengine.runtime.batch import DROPPED, Packing
from jaxengine.runtime.slots import TableLayout, sampler_values, slot_layout, slot_values
from jaxengine.runtime.state import edit_table
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.plan import (
    DecodePlan,
    DecodeRow,
    NewRow,
    PageWrites,
    PrefillPlan,
    PrefillRow,
)
from jaxengine.types import Param, SequenceRequest

BUCKETS = Buckets(
    decode_rows=(1, 4, 8),
    prefill_tokens=(32, 256),
    num_slots=8,
    page_size=16,
    max_window_steps=32,
)
PARAMS = {
    "temperature": Param("float32", 1.0),
    "bias_ids": Param("int32", (), shape=(300,), pad=-1),
}
SLOTS = slot_layout(pages_per_sequence=16)
SEATS = TableLayout(PARAMS)


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
    return PrefillPlan(num_tokens=num_tokens, rows=list(rows), **kwargs)


def decode_plan(*slots: int, num_rows: int = 4, **kwargs: Any) -> DecodePlan:
    rows = [DecodeRow(slot, slot) for slot in slots]
    return DecodePlan(num_rows=num_rows, num_steps=17, rows=rows, **kwargs)


def apply(
    table: np.ndarray,
    segments: dict[str, list[int]],
    layout: TableLayout = SLOTS,
    prefix: str = "",
) -> np.ndarray:
    """A table after the edits."""
    edits = {name: jnp.asarray(values, jnp.int32) for name, values in segments.items()}
    return np.asarray(edit_table(layout, jnp.asarray(table), edits, prefix))


def garbage_table(num_slots: int = BUCKETS.num_slots, layout: TableLayout = SLOTS) -> np.ndarray:
    return np.full((num_slots, layout.width), -9, np.int32)


# Packing


SIZES = {"a": 3, "b": 0, "slot_ids": 1, "targets": 7}
INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.fixed_dictionaries({k: st.lists(INT32, max_size=n) for k, n in SIZES.items()}))
@settings(deadline=None)
def test_pack_and_unpack_are_inverse(values: dict[str, list[int]]):
    packing, fill = Packing(SIZES), {"slot_ids": DROPPED, "targets": -1}
    packed = packing.pack(values)
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
        page_writes=PageWrites([5, 2], [0, 1], [33, 44]),
    )
    edits = batch.slot_edits(SLOTS, plan.new_rows, plan.page_writes)
    seats = batch.seat_edits(SEATS, plan.new_rows)
    packed = batch.pack_prefill(plan, BUCKETS, edits, seats)
    got = unpack(batch.prefill_packing(BUCKETS, 32), packed)
    assert got["token_ids"] == [0, 1, 2, 8, 9, 10, 11, 1] + [0] * 24
    assert got["slot_ids"] == [5, 2, 7] + [DROPPED] * 5
    assert got["q_starts"] == [0, 3, 7, 8] + [8] * 5
    assert got["kv_lens"] == [3, 12, 2] + [0] * 5
    assert got["draws"] == [1, 0, 1] + [0] * 5
    assert got["resets"] == got["seat_resets"] == [5, 7] + [DROPPED] * 6

    table = apply(garbage_table(), got)
    pages = SLOTS.columns["page_table"].start
    assert table[5, pages] == 33 and table[2, pages + 1] == 44
    assert (table[[0, 1, 3, 4, 6]] == -9).all()
    assert np.count_nonzero(table[2] != -9) == 1
    wanted = SLOTS.default_row.copy()
    cells, values = SLOTS.cells(7, slot_values(new_row(7, output_ids=(1, 2))))
    wanted[np.asarray(cells) - 7 * SLOTS.width] = values
    assert table[7].tolist() == wanted.tolist()
    table = apply(garbage_table(layout=SEATS), got, SEATS, "seat_")
    temperature = SEATS.read(jnp.asarray(table), "temperature")
    assert temperature[5] == 1.25 and temperature[7] == 1.75
    assert (table[[0, 1, 2, 3, 4, 6]] == -9).all()


def test_prefill_may_fill_its_bucket():
    plan = prefill_plan(*(chunk(slot, 0, 4) for slot in range(8)))
    packed = batch.pack_prefill(plan, BUCKETS, batch.NO_EDITS, batch.NO_EDITS)
    got = unpack(batch.prefill_packing(BUCKETS, 32), packed)
    assert got["q_starts"] == list(range(0, 33, 4))
    assert got["slot_ids"] == list(range(8)) and got["resets"] == [DROPPED] * 8


# Decode


def test_decode_is_packed():
    plan = decode_plan(6, 0, 3, page_writes=PageWrites([0], [2], [9]))
    edits = batch.slot_edits(SLOTS, [], plan.page_writes)
    packed = batch.pack_decode(plan, BUCKETS, 4, edits)
    got = unpack(batch.decode_packing(BUCKETS, 4), packed)
    assert got["num_steps"] == [17]
    assert got["slot_ids"] == [6, 0, 3, DROPPED]
    assert got["leaders"] == [0, 1, 2, 3]
    table = apply(garbage_table(), got)
    assert table[0, SLOTS.columns["page_table"].start + 2] == 9
    assert np.count_nonzero(table != -9) == 1


@pytest.mark.parametrize("num_rows", BUCKETS.decode_rows)
def test_decode_has_room_for_all_pages_of_a_window(num_rows: int):
    # A window of 32 that starts on the last place of a page of 16 takes two pages more.
    writes = PageWrites.none()
    for slot in range(num_rows):
        writes.add(slot, 3, [1, 2])
    edits = batch.slot_edits(SLOTS, [], writes)
    assert batch.fits(batch.decode_packing(BUCKETS, num_rows), edits)


def test_what_overflows_does_not_fit():
    packing = batch.decode_packing(BUCKETS, 1)
    writes = PageWrites.none()
    writes.add(0, 0, [*range(BUCKETS.page_writes(1) + 1)])
    assert not batch.fits(packing, batch.slot_edits(SLOTS, [], writes))
    assert batch.fits(packing, batch.NO_EDITS)
    no_resets = batch.slot_edits(SLOTS, [new_row(0)], PageWrites.none())
    assert not batch.fits(packing, no_resets)
    seats = batch.seat_edits(SEATS, [new_row(slot, num_biases=300) for slot in range(8)])
    assert not batch.fits(batch.prefill_packing(BUCKETS, 32), seats, "seat_")


def test_companions_follow_their_leader():
    rows = [DecodeRow(i, i, 3, member) for i, member in enumerate((0, 0, 1, 2, 0, 1))]
    plan = DecodePlan(num_rows=8, num_steps=4, rows=rows)
    got = unpack(
        batch.decode_packing(BUCKETS, 8), batch.pack_decode(plan, BUCKETS, 8, batch.NO_EDITS)
    )
    assert got["leaders"] == [0, 1, 1, 1, 4, 4, 6, 7]


# Split form


def test_a_sampler_draws_for_its_own_rows_only():
    plan = prefill_plan(
        chunk(5, 0, 3)._replace(sampler_id=2),
        chunk(2, 8, 4, draws=False)._replace(sampler_id=2),
        chunk(7, 1, 1),
    )
    got = unpack(batch.draw_packing(8), batch.pack_draw(plan, 8, 2))
    assert got["slot_ids"] == [5, 2, 7] + [DROPPED] * 5
    assert got["draws"] == [1] + [0] * 7
    assert (
        unpack(batch.draw_packing(8), batch.pack_draw(plan, 8, 0))["draws"] == [0, 0, 1] + [0] * 5
    )


def test_prompt_targets_are_packed_with_the_ids_of_their_rows():
    plan = prefill_plan(
        chunk(5, 0, 3),
        chunk(2, 8, 4, draws=False)._replace(targets=np.asarray([-1, 10, 11, 12], np.int32)),
    )
    packed = batch.pack_score(plan, BUCKETS, {2: (40, 41), 5: ()})
    got = unpack(batch.score_packing(BUCKETS, 32), packed)
    assert got["targets"] == [-1, -1, -1, -1, 10, 11, 12] + [-1] * 25
    assert got["rows"][:7] == [0, 0, 0, 1, 1, 1, 1]
    ids = np.asarray(got["logprob_ids"]).reshape(8, -1)
    assert ids[1, :3].tolist() == [40, 41, -1] and (ids[[0, *range(2, 8)]] == -1).all()


# Overflow


def test_edits_in_pieces_give_the_same_table():
    num_slots = batch.EDIT_ROWS + 44
    rows = [new_row(slot, num_biases=200) for slot in range(num_slots)]
    edits = batch.seat_edits(SEATS, rows)
    assert len(edits.resets) > batch.EDIT_ROWS and len(edits.cells) > 3 * batch.EDIT_CELLS
    garbage = garbage_table(num_slots, SEATS)
    whole = apply(garbage, {k: list(v) for k, v in edits._asdict().items()}, SEATS)
    pieces = garbage
    for piece in batch.split_edits(edits):
        pieces = apply(pieces, unpack(batch.edit_packing(), piece), SEATS)
    assert np.array_equal(pieces, whole)
    for slot in (0, num_slots - 1):
        cells, values = SEATS.cells(slot, sampler_values(SEATS, rows[slot]))
        assert whole.reshape(-1)[cells].tolist() == values


def test_resets_come_before_any_cell():
    rows = [new_row(slot, num_biases=100) for slot in range(300)]
    pieces = batch.split_edits(batch.seat_edits(SEATS, rows))
    parts = [unpack(batch.edit_packing(), piece) for piece in pieces]
    has_resets = [part["resets"][0] != DROPPED for part in parts]
    has_cells = [part["cells"][0] != DROPPED for part in parts]
    assert has_resets == sorted(has_resets, reverse=True) and sum(has_resets) == 2
    assert not any(a and b for a, b in zip(has_resets, has_cells, strict=True))


def test_no_edits_take_no_program():
    assert batch.split_edits(batch.NO_EDITS) == []
    assert [len(part) for part in batch.slot_edits(SLOTS, [], PageWrites.none())] == [0, 0, 0]
