"""A slot's row: what the host writes into its cells is what the device reads."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.runtime.slots import (
    FIELDS,
    TableLayout,
    sampler_layout,
    sampler_values,
    slot_layout,
    slot_values,
)
from jaxengine.sampling import LogitsTransform, Needs, Sampler, default_sampler
from jaxengine.scheduler.plan import NewRow
from jaxengine.types import MAX_STOP_TOKEN_IDS, Param, SequenceRequest

PARAMS = {
    "temperature": Param("float32", 1.0),
    "top_k": Param("int32", -1),
    "bias_ids": Param("int32", (), shape=(6,), pad=-1),
    "bias_values": Param("float32", (), shape=(6,)),
    "words": Param("int32", None, shape=(2,), pad=-1),
    "matrix": Param("float32", ((1, 2, 3), (4, 5, 6)), shape=(2, 3)),
}
SLOTS = slot_layout(pages_per_sequence=5)
PARAM_TABLE = TableLayout(PARAMS)
NUM_SLOTS = 4
INT32 = st.integers(-(2**31), 2**31 - 1)
FLOAT32 = st.floats(width=32)


def new_row(
    slot: int = 0,
    output_ids: tuple[int, ...] = (),
    values: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> NewRow:
    kwargs = {"prompt_ids": np.arange(7, dtype=np.int32), "max_new_tokens": 50} | kwargs
    request = SequenceRequest(seq_id=1, rid="a", values=values or {}, **kwargs)
    return NewRow(slot, request, output_ids)


def table_with(layout: TableLayout, slot: int, values: Mapping[str, Any]) -> np.ndarray:
    """A table after a reset of the slot and its cells; other rows are -9."""
    table = np.full((NUM_SLOTS, layout.width), -9, np.int32)
    table[slot] = layout.default_row
    cells, bits = layout.cells(slot, values)
    table.reshape(-1)[cells] = bits
    return table


def slot_table(row: NewRow) -> np.ndarray:
    """The engine's own table with this row."""
    return table_with(SLOTS, row.slot, slot_values(row))


def param_table(row: NewRow, layout: TableLayout = PARAM_TABLE) -> np.ndarray:
    """A sampler's table with this row."""
    return table_with(layout, row.slot, sampler_values(layout, row))


def read(table: np.ndarray, slot: int, name: str, layout: TableLayout | None = None) -> np.ndarray:
    layout = layout or (SLOTS if table.shape[1] == SLOTS.width else PARAM_TABLE)
    return np.asarray(layout.read(jnp.asarray(table), name))[slot]


def bits(value: Any, dtype: str = "float32") -> list[int]:
    return np.asarray(value, dtype).reshape(-1).view(np.int32).tolist()


def test_columns_lie_side_by_side():
    place = 0
    for column in SLOTS.columns.values():
        assert column.start == place
        place += column.size
    assert SLOTS.width == place == len(SLOTS.default_row)
    assert list(SLOTS.columns) == [*FIELDS, "page_table"]


def test_default_row_reads_as_defaults():
    table = np.tile(PARAM_TABLE.default_row, (NUM_SLOTS, 1))
    assert read(table, 2, "temperature") == 1.0 and read(table, 2, "top_k") == -1
    assert read(table, 2, "bias_ids").tolist() == [-1] * 6
    assert read(table, 2, "words").tolist() == [-1, -1]
    assert read(table, 2, "matrix").tolist() == [[1, 2, 3], [4, 5, 6]]
    table = np.tile(SLOTS.default_row, (NUM_SLOTS, 1))
    assert read(table, 2, "stop_token_ids").tolist() == [-1] * MAX_STOP_TOKEN_IDS
    assert read(table, 2, "page_table").tolist() == [0] * 5


def test_cells_of_a_new_sequence():
    row = new_row(
        slot=3,
        values={"temperature": 0.5, "bias_ids": [4, 5], "bias_values": [0.25, -1e9]},
        min_new_tokens=3,
        stop_token_ids=(9, 8),
        ignore_eos=True,
        wants_logprobs=True,
    )
    table = slot_table(row)
    wanted = {
        "token": 6,
        "position": 6,
        "num_generated": 0,
        "is_done": 0,
        "prompt_len": 7,
        "max_new_tokens": 50,
        "min_new_tokens": 3,
        "ignore_eos": 1,
        "wants_logprobs": 1,
        "stop_token_ids": [9, 8] + [-1] * (MAX_STOP_TOKEN_IDS - 2),
    }
    assert {name: read(table, 3, name).tolist() for name in wanted} == wanted
    assert (table[:3] == -9).all()
    table = param_table(row)
    wanted = {
        "temperature": 0.5,
        "top_k": -1,
        "bias_ids": [4, 5, -1, -1, -1, -1],
        "bias_values": [0.25, np.float32(-1e9), 0, 0, 0, 0],
    }
    assert {name: read(table, 3, name).tolist() for name in wanted} == wanted
    assert (table[:3] == -9).all()


def test_cells_of_a_sequence_whose_state_was_lost():
    table = slot_table(new_row(slot=1, output_ids=(11, 12, 13)))
    assert read(table, 1, "token") == 13
    assert read(table, 1, "num_generated") == 3
    # Prompt 0..6, outputs 7 and 8 are computed anew; 13 will be written at 9.
    assert read(table, 1, "position") == 9
    assert read(table, 1, "is_done") == 0


def test_only_what_differs_from_the_default_travels():
    row = new_row(values={"temperature": 1.0, "top_k": -1})
    cells, _ = PARAM_TABLE.cells(0, sampler_values(PARAM_TABLE, row))
    assert len(cells) == 0
    cells, values = SLOTS.cells(0, slot_values(row))
    assert len(cells) == len(values) == 4  # token, position, prompt_len and max_new_tokens


@given(st.integers(0, 2**63 - 1))
def test_seed_survives(seed: int):
    table = slot_table(new_row(seed=seed))
    hi, lo = int(read(table, 0, "seed_hi")), int(read(table, 0, "seed_lo"))
    assert hi << 32 | lo & 0xFFFFFFFF == seed


@given(
    temperature=FLOAT32,
    top_k=INT32,
    bias=st.lists(st.tuples(INT32, FLOAT32), max_size=6),
    stops=st.lists(INT32, max_size=MAX_STOP_TOKEN_IDS),
)
def test_values_survive_bit_for_bit(
    temperature: float, top_k: int, bias: list[tuple[int, float]], stops: list[int]
):
    ids, values = [i for i, _ in bias], [v for _, v in bias]
    request = {"temperature": temperature, "top_k": top_k, "bias_ids": ids, "bias_values": values}
    row = new_row(slot=2, values=request, stop_token_ids=tuple(stops))
    table = param_table(row)
    assert bits(read(table, 2, "temperature")) == bits(temperature)
    assert read(table, 2, "top_k") == top_k
    assert read(table, 2, "bias_ids").tolist() == ids + [-1] * (6 - len(ids))
    assert bits(read(table, 2, "bias_values")) == bits(values) + [0] * (6 - len(ids))
    assert read(slot_table(row), 2, "stop_token_ids").tolist()[: len(stops)] == stops


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0, 1e-45])
def test_odd_floats_keep_their_bits(value: float):
    table = param_table(new_row(values={"temperature": value}))
    assert bits(read(table, 0, "temperature")) == bits(value)


def test_page_cells_are_the_page_table():
    table = slot_table(new_row(slot=1))
    for index, page in enumerate((30, 31, 32)):
        table.reshape(-1)[SLOTS.cell(1, "page_table", index)] = page
    assert read(table, 1, "page_table").tolist() == [30, 31, 32, 0, 0]


def test_write_scatters_columns_and_drops_padded_rows():
    table = np.tile(SLOTS.default_row, (NUM_SLOTS, 1))
    slot_ids = jnp.asarray([2, np.iinfo(np.int32).max, 0])
    values = {"token": jnp.asarray([5, 6, 7]), "is_done": jnp.asarray([True, True, False])}
    got = np.array(SLOTS.write(jnp.asarray(table), slot_ids, values))
    assert read(got, 2, "token") == 5 and read(got, 2, "is_done") == 1
    assert read(got, 0, "token") == 7 and read(got, 0, "is_done") == 0
    got[[0, 2]] = table[[0, 2]]
    assert np.array_equal(got, table)


def test_default_sampler_values_travel_too():
    layout = sampler_layout(default_sampler())
    values = {name: param.default for name, param in default_sampler().params.items()}
    table = param_table(new_row(values=values), layout)
    for name, param in default_sampler().params.items():
        got = read(table, 0, name, layout)
        assert got.shape == param.shape and got.dtype == param.dtype
    assert len(layout.cells(0, values)[0]) == 0


@pytest.mark.parametrize(
    "length, wanted", [(4, [3, 4, 5, 6]), (9, [-1, -1, 0, 1, 2, 3, 4, 5, 6]), (7, [*range(7)])]
)
def test_history_begins_with_the_end_of_the_prompt(length: int, wanted: list[int]):
    transform = LogitsTransform(lambda logits, state, ctx: logits, needs=Needs(history=length))
    layout = sampler_layout(Sampler(transform))
    assert read(param_table(new_row(), layout), 0, "history", layout).tolist() == wanted
