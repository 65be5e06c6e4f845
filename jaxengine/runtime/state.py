"""What lives on the device between steps; donated to a step and returned by it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxengine.runtime import batch
from jaxengine.runtime.slots import TableLayout

type Segments = dict[str, Int[Array, " n"]]

COUNT_DTYPE = jnp.int16
"""Token counts are slots x vocabulary, so they are kept narrow."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What every step changes, whatever its sampler.

    Leaves are arrays, tracers, or shapes alone.

    Attributes:
      kv_cache: A page array [pages, 2, K, page_size, H] per layer.
      slots: The engine's own table, int32 [S, W]; see `slot_layout`.
      token_counts: How often each slot generated each token, int16 [S, V].
    """

    kv_cache: list[Any]
    slots: Any
    token_counts: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Seats:
    """What one sampler keeps of every slot.

    Attributes:
      table: Its parameters, int32 [S, W]; see `sampler_layout`.
      state: Its `SamplerState`, leading axis S.
    """

    table: Any
    state: Any


class Rows(NamedTuple):
    """The slots of a step, read once.

    Attributes:
      slot_ids: Where they stand in the table.
      is_real: Slot ids out of range are no real rows.
      columns: By name, [B, ...]. Read here rather than where they are needed: within the loop of a
        window every column would be a kernel in every step.
    """

    slot_ids: Int[Array, " B"]
    is_real: Bool[Array, " B"]
    columns: Mapping[str, Array]


class Cursor(NamedTuple):
    """Where the text of every row stands: the columns of its slot that a step moves on."""

    token: Int[Array, " B"]
    position: Int[Array, " B"]
    num_generated: Int[Array, " B"]
    is_done: Bool[Array, " B"]

    def pack(self) -> Int[Array, "B 4"]:
        """One array, as a loop carries it: each of its own would be a kernel in every step."""
        return jnp.stack([column.astype(jnp.int32) for column in self], axis=1)

    @classmethod
    def unpack(cls, packed: Int[Array, "B 4"]) -> "Cursor":
        """What was packed."""
        token, position, num_generated, is_done = packed.T
        return cls(token, position, num_generated, is_done.astype(bool))


def edit_table(
    layout: TableLayout, table: Int[Array, "S W"], edits: Segments, prefix: str = ""
) -> Int[Array, "S W"]:
    """Resets rows, then sets cells."""
    if prefix + "resets" in edits:
        row = jnp.asarray(layout.default_row)
        table = table.at[edits[prefix + "resets"]].set(row, mode="drop")
    cells, values = edits[prefix + "cells"], edits[prefix + "cell_values"]
    return table.reshape(-1).at[cells].set(values, mode="drop").reshape(table.shape)


def read_rows(layout: TableLayout, table: Int[Array, "S W"], slot_ids: Int[Array, " B"]) -> Rows:
    """Gathers rows."""
    cells = jnp.take(table, slot_ids, axis=0, mode="clip")
    # Without the barrier XLA reads the table again where it is written, and so copies it.
    cells = jax.lax.optimization_barrier(cells)
    columns = {name: layout.read(cells, name) for name in layout.columns}
    return Rows(slot_ids, slot_ids < table.shape[0], columns)


def gather(state: Any, slot_ids: Int[Array, " B"]) -> Any:
    """Rows of every leaf."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, slot_ids, axis=0, mode="clip"), state)


def scatter(state: Any, slot_ids: Int[Array, " B"], rows: Any) -> Any:
    """Rows of every leaf written back; slot ids out of range are dropped."""
    return jax.tree.map(lambda leaf, new: leaf.at[slot_ids].set(new, mode="drop"), state, rows)


def count_tokens(
    counts: Int[Array, "S V"],
    slot_ids: Int[Array, " n"],
    tokens: Int[Array, " n"],
    is_counted: Bool[Array, " n"],
    *,
    unique: bool,
) -> Int[Array, "S V"]:
    """Counts generated tokens, each when it is fed to the model."""
    if len(tokens) == 1:
        # Read, add, write of a cell that is there: one kernel, where a scatter of one is three.
        cell = (slot_ids[0], tokens[0])
        count = jax.lax.dynamic_slice(counts, cell, (1, 1)) + is_counted.astype(counts.dtype)
        return jax.lax.dynamic_update_slice(counts, count, cell)
    rows = jnp.where(is_counted, slot_ids, batch.DROPPED)
    one = jnp.ones((), counts.dtype)
    return counts.at[rows, tokens].add(one, mode="drop", unique_indices=unique)
