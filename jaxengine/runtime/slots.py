"""Slots: one int32 row on the device per running sequence, floats bitcast.

Everything the decode loop must know of a sequence stands in its row: what changes when the batch
changes then travels as (cell, value) pairs in one packed array, and the whole table is one leaf.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxengine.scheduler.plan import NewRow
from jaxengine.types import MAX_STOP_TOKEN_IDS, NULL_PAGE, Param

FIELDS: dict[str, Param] = {
    "token": Param("int32", 0),
    "position": Param("int32", 0),
    "num_generated": Param("int32", 0),
    "is_done": Param("int32", 0),
    "prompt_len": Param("int32", 0),
    "max_new_tokens": Param("int32", 0),
    "min_new_tokens": Param("int32", 0),
    "ignore_eos": Param("int32", 0),
    "wants_logprobs": Param("int32", 0),
    "seed_hi": Param("int32", 0),
    "seed_lo": Param("int32", 0),
    "stop_token_ids": Param("int32", (), shape=(MAX_STOP_TOKEN_IDS,), pad=-1),
}
"""The engine's own columns: `token` is the last one drawn, not yet in the KV cache, and `position`
is where it will be written."""


class Column(NamedTuple):
    """Where a value stands in a slot's row."""

    start: int
    param: Param

    @property
    def size(self) -> int:
        """Cells it takes."""
        return int(np.prod(self.param.shape, dtype=np.int64))


class SlotLayout:
    """Columns of a slot: the engine's, the sampler's parameters, then the page table."""

    def __init__(self, params: Mapping[str, Param], pages_per_sequence: int) -> None:
        clash = FIELDS.keys() & params.keys()
        if clash:
            raise ValueError(f"sampler parameters use reserved names: {sorted(clash)}")
        page_table = Param("int32", (), shape=(pages_per_sequence,), pad=NULL_PAGE)
        self.param_names = tuple(params)
        self.columns: dict[str, Column] = {}
        self.width = 0
        for name, param in {**FIELDS, **params, "page_table": page_table}.items():
            self.columns[name] = Column(self.width, param)
            self.width += self.columns[name].size
        self.default_row = np.concatenate(
            [self._bits(name, c.param.default) for name, c in self.columns.items()]
        )

    def describe(self) -> tuple[tuple[str, int, str], ...]:
        """Names, places and types of the columns: what compiled programs depend on."""
        return tuple((name, c.start, c.param.dtype) for name, c in self.columns.items())

    def _bits(self, name: str, value: Any) -> np.ndarray:
        param = self.columns[name].param
        padded = np.full(param.shape, param.pad, dtype=param.dtype)
        value = np.asarray(value, dtype=param.dtype)
        padded[tuple(slice(n) for n in value.shape)] = value
        return padded.reshape(-1).view(np.int32)

    def cells(self, row: NewRow) -> tuple[np.ndarray, np.ndarray]:
        """Flat cell indices and values that turn a default row into this sequence's."""
        request, outputs = row.request, row.output_ids
        values: dict[str, Any] = dict(request.values)
        values |= {
            "prompt_len": len(request.prompt_ids),
            "max_new_tokens": request.max_new_tokens,
            "min_new_tokens": request.min_new_tokens,
            "ignore_eos": int(request.ignore_eos),
            "wants_logprobs": int(request.wants_logprobs),
            "seed_hi": _as_int32(request.seed >> 32),
            "seed_lo": _as_int32(request.seed & 0xFFFFFFFF),
            "stop_token_ids": request.stop_token_ids,
            "num_generated": len(outputs),
        }
        if outputs:
            values["token"] = outputs[-1]
            values["position"] = len(request.prompt_ids) + len(outputs) - 1
        wanted = self.default_row.copy()
        for name, value in values.items():
            column = self.columns[name]
            wanted[column.start : column.start + column.size] = self._bits(name, value)
        changed = np.flatnonzero(wanted != self.default_row)
        return row.slot * self.width + changed, wanted[changed]

    def page_cell(self, slot: int, index: int) -> int:
        """Flat index of a page-table entry."""
        return slot * self.width + self.columns["page_table"].start + index

    def read(self, rows: Int[Array, "B W"], name: str) -> Array:
        """One column of gathered rows, in its own shape and dtype."""
        column = self.columns[name]
        cells = rows[:, column.start : column.start + column.size]
        if column.param.dtype == "float32":
            cells = jax.lax.bitcast_convert_type(cells, jnp.float32)
        return cells.reshape(rows.shape[0], *column.param.shape)

    def write(
        self, slots: Int[Array, "S W"], slot_ids: Int[Array, " B"], values: Mapping[str, Array]
    ) -> Int[Array, "S W"]:
        """Scatters scalar int32 columns back; slot ids out of range are dropped."""
        columns = np.asarray([self.columns[name].start for name in values])
        stacked = jnp.stack([v.astype(jnp.int32) for v in values.values()], axis=-1)
        return slots.at[slot_ids[:, None], columns[None, :]].set(
            stacked, mode="drop", unique_indices=True
        )


def _as_int32(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits
