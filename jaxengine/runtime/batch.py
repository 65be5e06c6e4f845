"""A plan as one packed int32 array: built on the host, taken apart on the device."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from jaxengine.runtime.slots import TableLayout, sampler_values, slot_values
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.plan import DecodePlan, NewRow, PageWrites, PrefillPlan, StepPlan
from jaxengine.types import MAX_LOGPROB_IDS

DROPPED = np.iinfo(np.int32).max
"""An index out of every range; scatters drop it."""


_INDICES = ("slot_ids", "resets", "cells", "seat_resets", "seat_cells")
_FILL = {"targets": -1, **dict.fromkeys(_INDICES, DROPPED)}
"""What stands in the open places of a segment, where it is not 0."""


class Packing:
    """Named int32 segments, one after another in one array."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._slices: dict[str, slice] = {}
        self.size = 0
        for name, size in sizes.items():
            self._slices[name] = slice(self.size, self.size + size)
            self.size += size
        self._empty = np.zeros(self.size, np.int32)
        for name, where in self._slices.items():
            self._empty[where] = _FILL.get(name, 0)

    def pack(self, values: Mapping[str, Any]) -> np.ndarray:
        """The array; what the values leave open is filled so that it means nothing."""
        packed = self._empty.copy()
        for name, value in values.items():
            if len(value):
                start = self._slices[name].start
                packed[start : start + len(value)] = value
        return packed

    def length(self, name: str) -> int:
        """Places of a segment; 0 when there is none."""
        where = self._slices.get(name, slice(0, 0))
        return where.stop - where.start

    def unpack(self, packed: Int[Array, " size"]) -> dict[str, Int[Array, " n"]]:
        """The segments, by name."""
        return {name: packed[where] for name, where in self._slices.items()}


EDIT_ROWS, EDIT_CELLS = 256, 16384
"""Room for edits in one call of a program that does nothing else."""


@functools.cache
def edit_packing() -> Packing:
    """Edits of one table alone, for the overflow of the others."""
    return Packing({"resets": EDIT_ROWS, "cells": EDIT_CELLS, "cell_values": EDIT_CELLS})


@functools.cache
def prefill_packing(buckets: Buckets, num_tokens: int) -> Packing:
    """Segments of a prefill of `num_tokens`; "seat_" is for the table of the sampler."""
    rows = buckets.prefill_rows(num_tokens)
    cells = num_tokens // buckets.page_size + 32 * rows
    return Packing(
        {
            "token_ids": num_tokens,
            "slot_ids": rows,
            "q_starts": rows + 1,
            "kv_lens": rows,
            "draws": rows,
            "resets": rows,
            "cells": cells,
            "cell_values": cells,
            "seat_resets": rows,
            "seat_cells": 32 * rows,
            "seat_cell_values": 32 * rows,
        }
    )


@functools.cache
def decode_packing(buckets: Buckets, num_rows: int) -> Packing:
    """Segments of a decode window over `num_rows`."""
    cells = buckets.page_writes(num_rows)
    return Packing(
        {
            "num_steps": 1,
            "slot_ids": num_rows,
            "leaders": num_rows,
            "cells": cells,
            "cell_values": cells,
        }
    )


@functools.cache
def draw_packing(num_rows: int) -> Packing:
    """Segments of a draw over the logits of `num_rows`."""
    return Packing({"slot_ids": num_rows, "draws": num_rows, "leaders": num_rows})


@functools.cache
def score_packing(buckets: Buckets, num_tokens: int) -> Packing:
    """Segments of the logprobs of a prefill's prompt tokens."""
    rows = buckets.prefill_rows(num_tokens)
    return Packing(
        {"targets": num_tokens, "rows": num_tokens, "logprob_ids": rows * MAX_LOGPROB_IDS}
    )


class Edits(NamedTuple):
    """Changes to a table: rows to reset, then cells to set."""

    resets: Sequence[int]
    cells: Sequence[int] | np.ndarray
    cell_values: Sequence[int] | np.ndarray


NO_EDITS = Edits((), (), ())


def slot_edits(layout: TableLayout, new_rows: list[NewRow], writes: PageWrites) -> Edits:
    """All changes a plan makes to the engine's own table."""
    cells, values = _cells(layout, [(row.slot, slot_values(row)) for row in new_rows])
    slots, indices, pages = (np.asarray(x, np.int32) for x in writes)
    return Edits(
        [row.slot for row in new_rows],
        np.concatenate([np.asarray(cells, np.int32), layout.cell(slots, "page_table", indices)]),
        np.concatenate([np.asarray(values, np.int32), pages]),
    )


def seat_edits(layout: TableLayout, new_rows: list[NewRow]) -> Edits:
    """All changes to a sampler's table; `new_rows` are its own."""
    rows = [(row.slot, sampler_values(layout, row)) for row in new_rows]
    return Edits([slot for slot, _ in rows], *_cells(layout, rows))


def _cells(
    layout: TableLayout, rows: list[tuple[int, dict[str, Any]]]
) -> tuple[list[int], list[int]]:
    cells, values = [], []
    for slot, row in rows:
        own_cells, own_values = layout.cells(slot, row)
        cells += own_cells
        values += own_values
    return cells, values


def split_edits(edits: Edits) -> list[np.ndarray]:
    """Edits as packed arrays that fit an edit program; resets come before any cell."""
    pieces = [
        Edits(edits.resets[i : i + EDIT_ROWS], (), ())
        for i in range(0, len(edits.resets), EDIT_ROWS)
    ]
    pieces += [
        Edits((), edits.cells[i : i + EDIT_CELLS], edits.cell_values[i : i + EDIT_CELLS])
        for i in range(0, len(edits.cells), EDIT_CELLS)
    ]
    return [edit_packing().pack(piece._asdict()) for piece in pieces]


def fits(packing: Packing, edits: Edits, prefix: str = "") -> bool:
    """Whether a packing has room for these edits."""
    return all(len(v) <= packing.length(prefix + name) for name, v in edits._asdict().items())


def pack_prefill(plan: PrefillPlan, buckets: Buckets, edits: Edits, seats: Edits) -> np.ndarray:
    """The packed array of a prefill; the edits must fit."""
    packing = prefill_packing(buckets, plan.num_tokens)
    starts = [0, *itertools.accumulate(len(row.token_ids) for row in plan.rows)]
    q_starts = np.full(packing.length("q_starts"), starts[-1], np.int32)
    q_starts[: len(starts)] = starts
    return packing.pack(
        {
            "token_ids": np.concatenate([row.token_ids for row in plan.rows]),
            "slot_ids": [row.slot for row in plan.rows],
            "q_starts": q_starts,
            "kv_lens": [row.start + len(row.token_ids) for row in plan.rows],
            "draws": plan.draws,
            **edits._asdict(),
            **{f"seat_{name}": value for name, value in seats._asdict().items()},
        }
    )


def pack_decode(plan: DecodePlan, buckets: Buckets, num_rows: int, edits: Edits) -> np.ndarray:
    """The packed array of a decode window over `num_rows`; the edits must fit."""
    return decode_packing(buckets, num_rows).pack(
        {
            "num_steps": [plan.num_steps],
            "slot_ids": [row.slot for row in plan.rows],
            "leaders": _leaders(plan, num_rows),
            **edits._asdict(),
        }
    )


def pack_draw(plan: StepPlan, num_rows: int, sampler_id: int) -> np.ndarray:
    """The packed array of a draw by one of the plan's samplers, for its own rows."""
    rows = zip(plan.rows, plan.draws, strict=True)
    draws = [draws and row.sampler_id == sampler_id for row, draws in rows]
    return draw_packing(num_rows).pack(
        {
            "slot_ids": [row.slot for row in plan.rows],
            "draws": draws,
            "leaders": _leaders(plan, num_rows),
        },
    )


def _leaders(plan: StepPlan, num_rows: int) -> np.ndarray:
    """For every row the row that leads its group: itself, but for companions."""
    leaders = np.arange(num_rows)
    if isinstance(plan, DecodePlan):
        leaders[: len(plan.rows)] -= [row.member for row in plan.rows]
    return leaders


def pack_score(
    plan: PrefillPlan, buckets: Buckets, logprob_ids: Mapping[int, tuple[int, ...]]
) -> np.ndarray:
    """The packed array of the logprobs of a prefill's prompt tokens.

    Args:
      plan: The prefill.
      buckets: All static sizes.
      logprob_ids: Given ids of every slot that has any.
    """
    ids = np.full((buckets.prefill_rows(plan.num_tokens), MAX_LOGPROB_IDS), -1, np.int32)
    targets, rows = [], []
    for i, row in enumerate(plan.rows):
        nothing = np.full(len(row.token_ids), -1, np.int32)
        targets.append(nothing if row.targets is None else row.targets)
        rows.append(nothing * 0 + i)
        asked = logprob_ids.get(row.slot, ())
        ids[i, : len(asked)] = asked
    return score_packing(buckets, plan.num_tokens).pack(
        {
            "targets": np.concatenate(targets),
            "rows": np.concatenate(rows),
            "logprob_ids": ids.reshape(-1),
        },
    )
