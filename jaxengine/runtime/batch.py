"""A plan as one packed int32 array: built on the host, taken apart on the device."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

from jaxengine.runtime.slots import SlotLayout
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.plan import DecodePlan, NewRow, PageWrite, PrefillPlan, StepPlan

DROPPED = np.iinfo(np.int32).max
"""An index out of every range; scatters drop it."""


class Packing:
    """Named int32 segments, one after another in one array."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._slices: dict[str, slice] = {}
        self.size = 0
        for name, size in sizes.items():
            self._slices[name] = slice(self.size, self.size + size)
            self.size += size

    def pack(self, fill: Mapping[str, int], values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The array; what `values` leaves open gets the segment's fill value (0 by default)."""
        packed = np.zeros(self.size, np.int32)
        for name, where in self._slices.items():
            packed[where] = fill.get(name, 0)
            value = values.get(name)
            if value is not None:
                packed[where.start : where.start + len(value)] = value
        return packed

    def length(self, name: str) -> int:
        """Places of a segment; 0 when there is none."""
        where = self._slices.get(name, slice(0, 0))
        return where.stop - where.start

    def unpack(self, packed: Int[Array, " size"]) -> dict[str, Int[Array, " n"]]:
        """The segments, by name."""
        return {name: packed[where] for name, where in self._slices.items()}


ADMIT_CELLS = 16384
ADMIT_ROWS = 256


def admit_packing() -> Packing:
    """Edits alone, for the overflow of the others."""
    return Packing({"resets": ADMIT_ROWS, "cells": ADMIT_CELLS, "cell_values": ADMIT_CELLS})


def prefill_packing(buckets: Buckets, num_tokens: int) -> Packing:
    """Segments of a prefill of `num_tokens`."""
    rows = buckets.prefill_rows(num_tokens)
    cells = num_tokens // buckets.page_size + 32 * rows
    return Packing(
        {
            "token_ids": num_tokens,
            "slot_ids": rows,
            "q_starts": rows + 1,
            "kv_lens": rows,
            "draws": rows,
            "is_new": rows,
            "resets": rows,
            "cells": cells,
            "cell_values": cells,
        }
    )


def decode_packing(buckets: Buckets, num_rows: int) -> Packing:
    """Segments of a decode window over `num_rows`."""
    cells = buckets.page_writes(num_rows)
    return Packing({"num_steps": 1, "slot_ids": num_rows, "cells": cells, "cell_values": cells})


_FILL = {"slot_ids": DROPPED, "resets": DROPPED, "cells": DROPPED}


class Edits(NamedTuple):
    """Changes to the slot table: rows to reset, then cells to set."""

    resets: np.ndarray
    cells: np.ndarray
    cell_values: np.ndarray


def collect_edits(
    layout: SlotLayout, new_rows: list[NewRow], page_writes: list[PageWrite]
) -> Edits:
    """All changes a plan makes to the slot table."""
    parts = [layout.cells(row) for row in new_rows]
    pages = np.asarray(
        [(layout.page_cell(w.slot, w.index), w.page) for w in page_writes], np.int64
    ).reshape(-1, 2)
    return Edits(
        np.asarray([row.slot for row in new_rows], np.int32),
        np.concatenate([*(cells for cells, _ in parts), pages[:, 0]]).astype(np.int32),
        np.concatenate([*(values for _, values in parts), pages[:, 1]]).astype(np.int32),
    )


def split_edits(edits: Edits) -> list[Edits]:
    """Edits in pieces that fit the `admit` program; resets come before any cell."""
    pieces = [
        Edits(edits.resets[i : i + ADMIT_ROWS], edits.cells[:0], edits.cell_values[:0])
        for i in range(0, len(edits.resets), ADMIT_ROWS)
    ]
    pieces += [
        Edits(
            edits.resets[:0],
            edits.cells[i : i + ADMIT_CELLS],
            edits.cell_values[i : i + ADMIT_CELLS],
        )
        for i in range(0, len(edits.cells), ADMIT_CELLS)
    ]
    return pieces


def pack_edits(edits: Edits) -> np.ndarray:
    """The packed array of one piece for the `admit` program."""
    return admit_packing().pack(_FILL, edits._asdict())


NO_EDITS = Edits(*(np.zeros(0, np.int32) for _ in range(3)))


def pack(plan: StepPlan, buckets: Buckets, edits: Edits) -> np.ndarray | None:
    """The packed array of a plan, or None when its edits do not fit."""
    if isinstance(plan, PrefillPlan):
        return pack_prefill(plan, buckets, edits)
    return pack_decode(plan, buckets, edits)


def pack_prefill(plan: PrefillPlan, buckets: Buckets, edits: Edits) -> np.ndarray | None:
    """The packed array of a prefill, or None when the edits do not fit it."""
    packing = prefill_packing(buckets, plan.num_tokens)
    if not _fits(packing, edits):
        return None
    lens = np.asarray([len(row.token_ids) for row in plan.rows], np.int32)
    num_rows = buckets.prefill_rows(plan.num_tokens)
    q_starts = np.full(num_rows + 1, lens.sum(), np.int32)
    q_starts[: len(lens) + 1] = np.concatenate([[0], np.cumsum(lens)])
    new = {row.slot for row in plan.new_rows if not row.output_ids}
    return packing.pack(
        _FILL,
        {
            "token_ids": np.concatenate([row.token_ids for row in plan.rows]),
            "slot_ids": np.asarray([row.slot for row in plan.rows]),
            "q_starts": q_starts,
            "kv_lens": np.asarray([r.start for r in plan.rows]) + lens,
            "draws": np.asarray([row.draws for row in plan.rows]),
            "is_new": np.asarray([row.slot in new for row in plan.rows]),
            **edits._asdict(),
        },
    )


def pack_decode(plan: DecodePlan, buckets: Buckets, edits: Edits) -> np.ndarray | None:
    """The packed array of a decode window, or None when the edits do not fit it."""
    packing = decode_packing(buckets, plan.num_rows)
    if not _fits(packing, edits):
        return None
    slot_ids = np.asarray([row.slot for row in plan.rows])
    steps = np.asarray([plan.num_steps])
    return packing.pack(_FILL, {"num_steps": steps, "slot_ids": slot_ids, **edits._asdict()})


def _fits(packing: Packing, edits: Edits) -> bool:
    return all(len(v) <= packing.length(name) for name, v in edits._asdict().items())
