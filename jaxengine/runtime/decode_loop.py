"""The sampler's part of a step, and the decode window in which no host takes part.

A sampler runs in one of two forms of the same functions. Fused: traced into the prefill and into
the window. Split: a program of its own over the logits of a forward step that knows no sampler,
chained by asynchronous dispatch; ready seconds after a notebook cell was edited.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.errors import SamplerError
from jaxengine.models.family import Params
from jaxengine.runtime import batch, results
from jaxengine.runtime.forward import Forward, Hidden
from jaxengine.runtime.results import ResultLayout, Results
from jaxengine.runtime.slots import HISTORY, TableLayout, sampler_layout
from jaxengine.runtime.state import (
    COUNT_DTYPE,
    Cursor,
    DeviceState,
    Rows,
    Seats,
    edit_table,
    gather,
    read_rows,
    scatter,
)
from jaxengine.sampling.context import SamplingContext, row_keys
from jaxengine.sampling.logprobs import Wants
from jaxengine.sampling.sampler import Sample, Sampler, SamplerState, init_state, sample
from jaxengine.sampling.transforms import select_rows
from jaxengine.types import HIDDEN


class _Group(NamedTuple):
    """Rows of a step as the sampler's part sees them.

    Attributes:
      rows: They.
      slots: Theirs, and some slot that there is where a row is not real.
      values: The sampler's own columns.
      leaders: For every row the row that leads its group.
    """

    rows: Rows
    slots: Int[Array, " B"]
    values: Mapping[str, Array]
    leaders: Int[Array, " B"]


class _Window(NamedTuple):
    """Carry of the decode loop."""

    step: Int[Array, ""]
    cursor: Int[Array, "B 4"]  # packed
    kv_cache: list[Array]
    token_counts: Int[Array, "S V"]
    sampler: SamplerState
    out: Results


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerSteps:
    """The compiled steps that draw, for one sampler.

    Attributes:
      forward: The model's part.
      sampler: Traced into every step; its `arrays` are only the shapes of arguments.
      layout: Columns of the sampler's own table.
      group_size: Rows that are continued by the same tokens: a prompt and its companions.
      result: What is reported of a token.
      row_state: Shapes of what the sampler keeps of a row.
      owner: Id of the programs compiled of it; 0 is the engine's own sampler.
    """

    forward: Forward
    sampler: Sampler
    layout: TableLayout
    group_size: int
    result: ResultLayout
    row_state: SamplerState | None = None
    owner: int = 0

    @classmethod
    def bind(
        cls, forward: Forward, sampler: Sampler, *, group_size: int = 1, owner: int = 0
    ) -> "SamplerSteps":
        """Traces the sampler once over abstract rows, to learn what it keeps and reports.

        Raises:
          SamplerError: If it cannot be traced; it names the part.
        """
        layout = sampler_layout(sampler)
        steps = cls(
            forward=forward,
            sampler=sampler,
            layout=layout,
            group_size=group_size,
            result=ResultLayout({}),
            owner=owner,
        )
        drawn, before, after = jax.eval_shape(steps._try_out, *steps._abstract_rows(2 * group_size))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise SamplerError(
                    f"The sampler's `update` turns state {a.dtype}{list(a.shape)} into "
                    f"{b.dtype}{list(b.shape)}; shape and dtype must stay as `init` gives them."
                )
        row_state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), before)
        return dataclasses.replace(steps, result=ResultLayout(drawn.leaves), row_state=row_state)

    @functools.cached_property
    def initial_seats(self) -> Seats:
        """Shapes of what the sampler keeps of all slots."""
        num_slots = self.forward.buckets.num_slots

        def of_all(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((num_slots, *x.shape), x.dtype)

        table = jax.ShapeDtypeStruct((num_slots, self.layout.width), jnp.int32)
        return Seats(table=table, state=jax.tree.map(of_all, self.row_state))

    def seat(self, seats: Seats, packed: Int[Array, " size"]) -> Seats:
        """Edits of the sampler's table alone."""
        edits = batch.edit_packing().unpack(packed)
        return dataclasses.replace(seats, table=edit_table(self.layout, seats.table, edits))

    def prefill(
        self,
        params: Params,
        state: DeviceState,
        seats: Seats,
        arrays: Any,
        packed: Int[Array, " size"],
        *,
        num_tokens: int,
    ) -> tuple[DeviceState, Seats, Results, Hidden]:
        """Runs packed chunks of several prompts, and draws the first token of those that end.

        Args:
          params: The model's arrays.
          state: Donated.
          seats: Donated.
          arrays: The sampler's own.
          packed: `batch.pack_prefill`.
          num_tokens: Bucket of the packed length.

        Returns:
          What was donated, the results of one step, and the hidden states of all tokens.
        """
        forward = self.forward
        plan = batch.prefill_packing(forward.buckets, num_tokens).unpack(packed)
        state = forward.edit(state, plan)
        table = edit_table(self.layout, seats.table, plan, "seat_")
        rows = read_rows(forward.layout, state.slots, plan["slot_ids"])
        hidden, last, cursor, state = forward.run_prefill(params, state, rows, plan)
        drawn_from = hidden.final[last]
        logits = forward.model.bind(params).logits(drawn_from, forward.ctx)
        group = self._group(rows, table, jnp.arange(len(last)))
        before = gather(seats.state, rows.slot_ids)
        drawn, after, end = self._draw(
            group, cursor, logits, drawn_from, state.token_counts, before, arrays, begins=True
        )
        drawing = jnp.where(cursor.is_done, batch.DROPPED, rows.slot_ids)
        state = dataclasses.replace(
            state, slots=forward.layout.write(state.slots, drawing, end._asdict())
        )
        seats = Seats(table=table, state=scatter(seats.state, drawing, after))
        return state, seats, self._one_step(drawn), hidden

    def decode(
        self,
        params: Params,
        state: DeviceState,
        seats: Seats,
        arrays: Any,
        packed: Int[Array, " size"],
        *,
        num_rows: int,
        has_hidden: bool = False,
    ) -> tuple[DeviceState, Seats, Results]:
        """A window: up to `num_steps` tokens for every row, until all rows are done.

        Args:
          params: The model's arrays.
          state: Donated.
          seats: Donated.
          arrays: The sampler's own.
          packed: `batch.pack_decode`.
          num_rows: Bucket of the batch.
          has_hidden: Report the hidden state of every token fed, the last of a row included.

        Returns:
          What was donated, and the results of the window.
        """
        forward = self.forward
        plan = batch.decode_packing(forward.buckets, num_rows).unpack(packed)
        num_steps = plan["num_steps"][0]
        state = forward.edit(state, plan)
        rows = read_rows(forward.layout, state.slots, plan["slot_ids"])
        group = self._group(rows, seats.table, plan["leaders"])
        model = forward.model.bind(params)
        layout = self.window_result(has_hidden=has_hidden)

        def step(w: _Window) -> _Window:
            before = Cursor.unpack(w.cursor)
            hidden, kv_cache, counts = forward.run_decode(
                params, w.kv_cache, w.token_counts, rows, before
            )
            logits = model.logits(hidden.final, forward.ctx)
            drawn, sampler, cursor = self._draw(
                group,
                before,
                logits,
                hidden.final,
                counts,
                w.sampler,
                arrays,
                # Alone, a sequence begins in a prefill.
                begins=self.group_size > 1,
                feeds_last=has_hidden,
            )
            reported = _reported(drawn)
            if has_hidden:
                reported[HIDDEN] = hidden.reported
            out = results.put(w.out, w.step, results.pack(reported, layout))
            return _Window(w.step + 1, cursor.pack(), kv_cache, counts, sampler, out)

        end = jax.lax.while_loop(
            lambda w: (w.step < num_steps) & ~Cursor.unpack(w.cursor).is_done.all(),
            step,
            _Window(
                step=jnp.int32(0),
                cursor=forward.cursor(rows).pack(),
                kv_cache=state.kv_cache,
                token_counts=state.token_counts,
                sampler=gather(seats.state, rows.slot_ids),
                out=results.empty(layout, num_rows, forward.buckets.max_window_steps),
            ),
        )
        cursor = Cursor.unpack(end.cursor)
        columns = {**cursor._asdict(), "num_counted": cursor.position}
        state = DeviceState(
            kv_cache=end.kv_cache,
            slots=forward.layout.write(state.slots, rows.slot_ids, columns),
            token_counts=end.token_counts,
        )
        seats = dataclasses.replace(seats, state=scatter(seats.state, rows.slot_ids, end.sampler))
        return state, seats, end.out

    def window_result(self, *, has_hidden: bool) -> ResultLayout:
        """What a window reports of a token."""
        if not has_hidden:
            return self.result
        shape, dtype = self.forward.reported_shape, self.forward.model.dtype
        hidden = jax.ShapeDtypeStruct(shape, dtype)
        return self.result.having({HIDDEN: hidden})

    def draw(
        self,
        slots: Int[Array, "S W"],
        seats: Seats,
        token_counts: Int[Array, "S V"],
        arrays: Any,
        logits: Float[Array, "B V"],
        hidden: Float[Array, "B D"],
        packed: Int[Array, " size"],
        *,
        has_lists: bool,
    ) -> tuple[Int[Array, "S W"], Seats, Results]:
        """The split form: draws for the sampler's rows of a forward step.

        Args:
          slots: The engine's own table; donated.
          seats: Donated.
          token_counts: Of the device state; only read.
          arrays: The sampler's own.
          logits: Of the forward step.
          hidden: Of the forward step.
          packed: `batch.pack_draw`.
          has_lists: Rows may want the most likely tokens, or given ids; much of what is to compile.

        Returns:
          What was donated, and the results of one step; rows of other samplers have none.
        """
        plan = batch.draw_packing(logits.shape[0]).unpack(packed)
        rows = read_rows(self.forward.layout, slots, plan["slot_ids"])
        cursor = self.forward.cursor(rows)
        cursor = cursor._replace(is_done=cursor.is_done | (plan["draws"] == 0))
        group = self._group(rows, seats.table, plan["leaders"])
        before = gather(seats.state, rows.slot_ids)
        drawn, after, end = self._draw(
            group,
            cursor,
            logits,
            hidden,
            token_counts,
            before,
            arrays,
            begins=True,
            has_lists=has_lists,
            # Somebody waits for the compiler between the edit of a cell and its first token.
            has_shortcuts=self.owner == 0,
        )
        drawing = jnp.where(cursor.is_done, batch.DROPPED, rows.slot_ids)
        slots = self.forward.layout.write(slots, drawing, end._asdict())
        seats = dataclasses.replace(seats, state=scatter(seats.state, drawing, after))
        return slots, seats, self._one_step(drawn)

    # -- parts of a step, traced into it

    def _group(self, rows: Rows, table: Int[Array, "S W"], leaders: Int[Array, " B"]) -> _Group:
        num_slots = self.forward.buckets.num_slots
        own = read_rows(self.layout, table, rows.slot_ids)
        return _Group(rows, jnp.minimum(rows.slot_ids, num_slots - 1), own.columns, leaders)

    def _draw(
        self,
        group: _Group,
        cursor: Cursor,
        logits: Float[Array, "B V"],
        hidden: Float[Array, "B D"],
        token_counts: Int[Array, "S V"],
        state: SamplerState,
        arrays: Any,
        *,
        begins: bool,
        feeds_last: bool = True,
        has_lists: bool = True,
        has_shortcuts: bool = True,
    ) -> tuple[Sample, SamplerState, Cursor]:
        """One token for every row that is not done, and where the rows stand then.

        Where `feeds_last`, rows may be there that feed their last token, too: these are done a
        step later, in which they draw nothing.
        """
        forward, rows, active = self.forward, group.rows, ~cursor.is_done
        feeding_last = jnp.zeros_like(active)
        if feeds_last:
            had_drawn = active & (cursor.num_generated > 0)
            feeding_last = had_drawn & forward.is_finished(rows, cursor.token, cursor.num_generated)
        active &= ~feeding_last
        with jax.named_scope("sample"):
            ctx = self._context(group, cursor, hidden, token_counts, arrays)
            if begins:
                is_first = active & (cursor.num_generated == 0)
                state = select_rows(is_first, init_state(self.sampler, ctx), state)
            wants = Wants(
                token=rows.columns["wants_logprobs"].astype(bool),
                lists=rows.columns["wants_lists"].astype(bool) if has_lists else None,
                ids=rows.columns["logprob_ids"],
                num_top=forward.num_top,
            )
            ctx = dataclasses.replace(ctx, history=state.history)
            drawn, after = sample(
                self.sampler,
                logits,
                state,
                ctx,
                wants,
                self._members(group),
                has_shortcuts=has_shortcuts,
            )
        num_generated = cursor.num_generated + active
        is_finished = active & forward.is_finished(rows, drawn.token, num_generated)
        if feeds_last:
            is_failed = drawn.token < 0
            is_finished &= is_failed | (rows.columns["feeds_last"] == 0)
        moved = Cursor(
            token=jnp.where(active, drawn.token, cursor.token),
            position=cursor.position + active,
            num_generated=num_generated,
            is_done=cursor.is_done | is_finished | feeding_last,
        )
        drawn = drawn._replace(token=jnp.where(active, drawn.token, -1))
        return drawn, select_rows(active, after, state), moved

    def _members(self, group: _Group) -> Int[Array, "B G"] | None:
        """Rows of each row's group, leader first."""
        if self.group_size == 1:
            return None
        members = group.leaders[:, None] + jnp.arange(self.group_size)
        return jnp.minimum(members, len(group.leaders) - 1)

    def _context(
        self,
        group: _Group,
        cursor: Cursor,
        hidden: Float[Array, "B D"],
        token_counts: Int[Array, "S V"],
        arrays: Any,
    ) -> SamplingContext:
        columns = group.rows.columns
        position = cursor.position + 1
        values = dict(group.values)
        return SamplingContext(
            history=values.pop(HISTORY, None),
            values=values,
            key=row_keys(columns["seed_hi"], columns["seed_lo"], position),
            position=position,
            num_generated=cursor.num_generated,
            min_new_tokens=columns["min_new_tokens"],
            last_token=cursor.token,
            prompt_len=columns["prompt_len"],
            active=~cursor.is_done,
            stop_token_ids=columns["stop_token_ids"],
            slots=group.slots,
            slot_counts=token_counts,
            hidden=hidden if self.sampler.needs.hidden else None,
            arrays=arrays,
        )

    def _one_step(self, drawn: Sample) -> Results:
        packed = results.pack(_reported(drawn), self.result)
        return jax.tree.map(lambda x: x[:, None], packed)

    def _abstract_rows(self, num_rows: int) -> tuple[Any, ...]:
        """Shapes of a step's rows, for `_try_out`."""
        config = self.forward.model.config

        def ints(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        return (
            ints(num_rows, self.forward.layout.width),
            ints(num_rows, self.layout.width),
            jax.ShapeDtypeStruct((num_rows, config.vocab_size), jnp.float32),
            jax.ShapeDtypeStruct((num_rows, config.hidden_size), self.forward.model.dtype),
            jax.ShapeDtypeStruct((num_rows, config.vocab_size), COUNT_DTYPE),
            self.sampler.arrays,
        )

    def _try_out(
        self, slots: Array, table: Array, logits: Array, hidden: Array, counts: Array, arrays: Any
    ) -> tuple[Sample, SamplerState, SamplerState]:
        """One draw over all slots: its sample, the state it begins with and the one it leaves."""
        rows = read_rows(self.forward.layout, slots, jnp.arange(len(slots)))
        cursor = self.forward.cursor(rows)
        group = self._group(rows, table, jnp.arange(len(slots)))
        state = init_state(self.sampler, self._context(group, cursor, hidden, counts, arrays))
        drawn, after, _ = self._draw(
            group, cursor, logits, hidden, counts, state, arrays, begins=False, has_lists=False
        )
        return drawn, state, after


def _reported(drawn: Sample) -> dict[str, Array]:
    return {results.TOKEN: drawn.token, **results.flatten(drawn.leaves)}
