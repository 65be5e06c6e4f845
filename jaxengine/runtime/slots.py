"""Slots: int32 tables on the device with a row per running sequence, floats bitcast.

Everything the decode loop must know of a sequence stands in its rows: what changes when the batch
changes then travels as (cell, value) pairs in one packed array, and a whole table is one leaf.
There is one table for the engine's own columns, and one for the parameters of every sampler.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxengine.sampling.sampler import Sampler
from jaxengine.scheduler.plan import NewRow
from jaxengine.types import MAX_LOGPROB_IDS, MAX_STOP_TOKEN_IDS, NULL_PAGE, Param

FIELDS: dict[str, Param] = {
    "token": Param("int32", 0),
    "position": Param("int32", 0),
    "num_generated": Param("int32", 0),
    "num_counted": Param("int32", 0),
    "is_done": Param("int32", 0),
    "prompt_len": Param("int32", 0),
    "max_new_tokens": Param("int32", 0),
    "min_new_tokens": Param("int32", 0),
    "ignore_eos": Param("int32", 0),
    "wants_logprobs": Param("int32", 0),
    "wants_lists": Param("int32", 0),
    "feeds_last": Param("int32", 0),
    "seed_hi": Param("int32", 0),
    "seed_lo": Param("int32", 0),
    "stop_token_ids": Param("int32", (), shape=(MAX_STOP_TOKEN_IDS,), pad=-1),
    "logprob_ids": Param("int32", (), shape=(MAX_LOGPROB_IDS,), pad=-1),
}
"""The engine's own columns: `token` is the last one of the text, not yet in the KV cache, and
`position` is where it will be written; tokens before `num_counted` are in the token counts."""


_FLOAT, _FLOAT_BITS = struct.Struct("f"), struct.Struct("i")


class Column(NamedTuple):
    """Where a value stands in a slot's row.

    Attributes:
      start: Its first cell.
      size: Cells it takes.
      param: Its shape, type and default.
    """

    start: int
    size: int
    param: Param


class TableLayout:
    """The columns of a table, side by side."""

    def __init__(self, params: Mapping[str, Param]) -> None:
        self.columns: dict[str, Column] = {}
        self.width = 0
        for name, param in params.items():
            self.columns[name] = Column(self.width, math.prod(param.shape), param)
            self.width += self.columns[name].size
        rows = [self._bits(name, c.param.default) for name, c in self.columns.items()]
        self.default_row = np.concatenate([np.zeros(0, np.int32), *rows])
        self._default_bits: list[int] = self.default_row.tolist()

    def describe(self) -> tuple[tuple[str, int, str], ...]:
        """Names, places and types of the columns: what compiled programs depend on."""
        return tuple((name, c.start, c.param.dtype) for name, c in self.columns.items())

    def _bits(self, name: str, value: Any) -> np.ndarray:
        param = self.columns[name].param
        padded = np.full(param.shape, param.pad, dtype=param.dtype)
        if value is not None:
            value = np.asarray(value, dtype=param.dtype)
            padded[tuple(slice(n) for n in value.shape)] = value
        return padded.reshape(-1).view(np.int32)

    def cells(self, slot: int, values: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Flat cell indices and values that turn a slot's default row into one with `values`."""
        cells, bits, row = [], [], slot * self.width
        for name, value in values.items():
            start, _, param = self.columns[name]
            if value is param.default:
                continue
            # Most are numbers, and numpy would take ten times as long.
            if type(value) is int and param.dtype == "int32" and not param.shape:
                new = [value]
            elif type(value) is float and param.dtype == "float32" and not param.shape:
                new = _FLOAT_BITS.unpack(_FLOAT.pack(value))
            else:
                new = self._bits(name, value).tolist()
            for cell, bit in enumerate(new, start):
                if bit != self._default_bits[cell]:
                    cells.append(row + cell)
                    bits.append(bit)
        return cells, bits

    def cell(self, slot: Any, name: str, index: Any) -> Any:
        """Flat index of one entry of a column; slots and indices may be arrays."""
        return slot * self.width + self.columns[name].start + index

    def read(self, rows: Int[Array, "B W"], name: str) -> Array:
        """One column of gathered rows, in its own shape and dtype."""
        column = self.columns[name]
        cells = rows[:, column.start : column.start + column.size]
        if column.param.dtype == "float32":
            cells = jax.lax.bitcast_convert_type(cells, jnp.float32)
        return cells.reshape(rows.shape[0], *column.param.shape)

    def write(
        self, table: Int[Array, "S W"], slot_ids: Int[Array, " B"], values: Mapping[str, Array]
    ) -> Int[Array, "S W"]:
        """Scatters scalar int32 columns back; slot ids out of range are dropped."""
        columns = np.asarray([self.columns[name].start for name in values])
        stacked = jnp.stack([v.astype(jnp.int32) for v in values.values()], axis=-1)
        return table.at[slot_ids[:, None], columns[None, :]].set(
            stacked, mode="drop", unique_indices=True
        )


def slot_layout(pages_per_sequence: int) -> TableLayout:
    """The engine's own columns, then the page table."""
    page_table = Param("int32", (), shape=(pages_per_sequence,), pad=NULL_PAGE)
    return TableLayout({**FIELDS, "page_table": page_table})


def slot_values(row: NewRow) -> dict[str, Any]:
    """What stands in the slot of a sequence that begins, or begins anew."""
    request, outputs = row.request, row.output_ids
    text_len = len(request.prompt_ids) + len(outputs)
    return {
        "token": outputs[-1] if outputs else int(request.prompt_ids[-1]),
        "position": text_len - 1,
        "num_generated": len(outputs),
        "prompt_len": len(request.prompt_ids),
        "max_new_tokens": request.max_new_tokens,
        "min_new_tokens": request.min_new_tokens,
        "ignore_eos": int(request.ignore_eos),
        "wants_logprobs": int(request.wants_logprobs),
        "wants_lists": int(request.wants_lists),
        "feeds_last": int(request.feeds_last),
        "seed_hi": _as_int32(request.seed >> 32),
        "seed_lo": _as_int32(request.seed & 0xFFFFFFFF),
        "stop_token_ids": request.stop_token_ids,
        "logprob_ids": request.logprob_ids,
    }


HISTORY = "history"
"""The column with the prompt's end, from which a sampler's own history starts."""


def sampler_layout(sampler: Sampler) -> TableLayout:
    """The sampler's parameters, and the history it begins with."""
    history = Param("int32", (), shape=(sampler.needs.history,), pad=-1)
    return TableLayout({**sampler.params, **({HISTORY: history} if history.shape[0] else {})})


def sampler_values(layout: TableLayout, row: NewRow) -> dict[str, Any]:
    """What stands in the sampler's table for a sequence that begins."""
    values = dict(row.request.values)
    if HISTORY in layout.columns:
        length = layout.columns[HISTORY].size
        end = row.request.prompt_ids[-length:]
        values[HISTORY] = np.concatenate([np.full(length - len(end), -1, np.int32), end])
    return values


def _as_int32(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits
