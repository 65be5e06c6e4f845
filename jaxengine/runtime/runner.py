"""The one border between host and device: plans go in, results come out, nothing else crosses."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine.errors import EngineDeadError, SamplerError
from jaxengine.models.family import Params
from jaxengine.runtime import batch
from jaxengine.runtime.executables import ProgramSpec
from jaxengine.runtime.forward import Embeds, Hidden
from jaxengine.runtime.program_factory import (
    DRAW,
    DRAW_LISTS,
    HIDDEN_DECODE,
    ProgramFactory,
    Specs,
)
from jaxengine.runtime.programs import IDLE, LATER, ProgramKey, Programs
from jaxengine.runtime.samplers import LiveSampler, Samplers
from jaxengine.runtime.state import DeviceState, Seats
from jaxengine.runtime.step_handle import Drawn, StepHandle, label
from jaxengine.sampling.identity import are_equal
from jaxengine.sampling.sampler import default_sampler
from jaxengine.scheduler.plan import DecodePlan, PrefillPlan, StepPlan
from jaxengine.types import HIDDEN

FUSE_AFTER_STEPS = 64
"""Split steps after which a sampler is worth compiling into the window; one tried once is not."""


class Runner:
    """Owns the device state, and is the only one who calls compiled programs."""

    def __init__(
        self, factory: ProgramFactory, params: Params, samplers: Samplers, programs: Programs
    ) -> None:
        self._factory = factory
        self._samplers = samplers
        self._programs = programs
        self._state: DeviceState | None = None
        self._logprob_ids: dict[int, tuple[int, ...]] = {}
        self._wants_lists: dict[int, bool] = {}
        self._feeds_last: dict[int, bool] = {}
        self.params: Params | None = None
        # What programs take: the same arrays, side by side.
        self._leaves: tuple[jax.Array, ...] = ()
        self._weights_id = 0
        self.swap(params, 0)
        self.reset()

    def reset(self) -> None:
        """Allocates the device state anew: at start, and after a step failed with it donated."""
        self._state = None
        for sampler in self._samplers.alive():
            sampler.seats = None
        self._state = _zeros(self._factory.state)

    def prepare(
        self,
        sampler: LiveSampler,
        *,
        lists: bool,
        scores: bool,
        hidden: bool = False,
        embeds: bool = False,
    ) -> None:
        """Waits for programs the engine did not begin with, in the caller's thread: not its own.

        Args:
          sampler: For its first tokens.
          lists: Also for logprobs of others than the drawn tokens.
          scores: Also for logprobs of prompt tokens.
          hidden: Also for hidden states.
          embeds: Also for embeddings in place of ids.

        Raises:
          SamplerError: If XLA does not compile the sampler.
        """
        factory = self._factory
        if scores:
            self._wait_for(factory.scores())
        is_own = sampler is self._samplers.own
        if hidden and is_own:
            is_cached = are_equal(sampler.steps.sampler, default_sampler())
            self._wait_for(factory.hidden_windows(sampler.steps, is_cached=is_cached))
        if embeds:
            self._wait_for(factory.embeds())
        if is_own and not embeds:
            return
        buckets, owner = factory.forward.buckets, sampler.steps.owner
        kind = DRAW_LISTS if lists else DRAW
        keys = [ProgramKey(kind, rows, owner=owner) for rows in buckets.split_rows]
        keys += [ProgramKey("seat", owner=owner), *(() if is_own else factory.first_forwards())]
        if any(key not in self._programs for key in keys):
            specs = {**factory.split(sampler.steps), **factory.forwards()}
            self._programs.add({key: specs[key] for key in keys}, IDLE)
        try:
            for key in keys:
                self._programs.get(key)
        except EngineDeadError:
            raise
        except Exception as error:
            raise SamplerError(f"XLA cannot compile the sampler: {error}") from error

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Hands a plan to the device and returns before it has run."""
        with jax.profiler.TraceAnnotation(label(plan)):
            return self._dispatch(plan)

    def _dispatch(self, plan: StepPlan) -> StepHandle:
        self._note_wishes(plan)
        rows = zip(plan.rows, plan.draws, strict=True)
        drawing = sorted({row.sampler_id for row, draws in rows if draws})
        samplers = [self._samplers[i] for i in drawing] or [self._samplers.own]
        if isinstance(plan, DecodePlan) and any(self._feeds_last.get(r.slot) for r in plan.rows):
            if samplers == [self._samplers.own]:
                return self._run_window(plan, samplers[0], HIDDEN_DECODE)
            return self._run_split(plan, samplers)
        if isinstance(plan, PrefillPlan) and any(row.embeds is not None for row in plan.rows):
            return self._run_split(plan, samplers)
        if len(samplers) == 1 and self._is_fused(plan, samplers[0]):
            return self._run_fused(plan, samplers[0])
        return self._run_split(plan, samplers)

    @property
    def device(self) -> Any:
        """Where the arrays are."""
        return jax.tree.leaves(self.target)[0].sharding.mesh.devices.flat[0]

    def num_bytes(self, tag: str) -> int:
        """Size of what is there: "weights", or "kv_cache", slots and counts included."""
        tree = self.params if tag == "weights" else self._state
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    @property
    def target(self) -> Params:
        """Shapes, dtypes and places the parameters must have."""
        return self._factory.params

    def swap(self, params: Params, weights_id: int) -> None:
        """Steps from here on use these parameters; those under way keep the ones they have.

        Args:
          params: Like `target`.
          weights_id: Which these are; tokens carry it.
        """
        self.params, self._weights_id = params, weights_id
        self._leaves = tuple(jax.tree.leaves(params))

    def release(self) -> None:
        """Drops every device array."""
        self.release_state()
        self.release_params()

    def release_state(self) -> None:
        """Drops KV pages, slots and all that samplers keep, until `reset`."""
        self._state = None
        for sampler in self._samplers.alive():
            sampler.seats = None

    def release_params(self) -> None:
        """Drops the parameters, until `swap`; arrays somebody else holds stay where they are."""
        self.params, self._leaves = None, ()

    def _is_fused(self, plan: StepPlan, sampler: LiveSampler) -> bool:
        """Whether the plan's programs have this sampler in them; if not yet, has them made."""
        if sampler is self._samplers.own:
            return True
        key = _key(plan, sampler)
        if sampler.num_split_steps >= FUSE_AFTER_STEPS and key not in self._programs:
            spec = self._factory.fused(sampler.steps, is_cached=False)[key]
            self._programs.add({key: spec}, IDLE)
        return self._programs.is_ready(key)

    def _run_fused(self, plan: StepPlan, sampler: LiveSampler) -> StepHandle:
        if isinstance(plan, DecodePlan):
            return self._run_window(plan, sampler, "decode")
        program = self._programs.get(_key(plan, sampler))
        packed = self._pack_prefill(plan, sampler)
        self._state, sampler.seats, out, hidden = program(
            self._leaves, self._state, self._seats(sampler), sampler.arrays, packed
        )
        drawn = [Drawn(sampler, out, sampler.steps.result, 0, 1)]
        return self._handle(plan, drawn, self._score(plan, hidden))

    def _run_window(self, plan: DecodePlan, sampler: LiveSampler, kind: str) -> StepHandle:
        has_hidden = kind == HIDDEN_DECODE
        program = self._programs.get(_key(plan, sampler)._replace(kind=kind))
        packed = self._pack_decode(plan, plan.num_rows)
        self._state, sampler.seats, out = program(
            self._leaves, self._state, self._seats(sampler), sampler.arrays, packed
        )
        num_steps = self._factory.forward.buckets.max_window_steps
        layout = sampler.steps.window_result(has_hidden=has_hidden)
        drawn = [Drawn(sampler, out, layout, 0, num_steps)]
        return self._handle(plan, drawn, {}, is_demanded=has_hidden)

    def _run_split(self, plan: StepPlan, samplers: list[LiveSampler]) -> StepHandle:
        drawn: list[Drawn] = []
        if isinstance(plan, PrefillPlan):
            kind, specs, extra = "forward_prefill", self._factory.forwards, ()
            if any(row.embeds is not None for row in plan.rows):
                kind, specs, extra = "embeds_prefill", self._factory.embeds, (self._embeds(plan),)
            program = self._program(ProgramKey(kind, plan.num_tokens), specs)
            packed = self._pack_prefill(plan, None)
            self._state, logits, last, hidden = program(self._leaves, self._state, packed, *extra)
            drawn += self._draw(plan, samplers, logits, last, 0)
            return self._handle(plan, drawn, self._score(plan, hidden))
        buckets = self._factory.forward.buckets
        num_rows = buckets.split_size(len(plan.rows))
        key = ProgramKey("forward_decode", num_rows)
        program = self._program(key, self._factory.forwards)
        packed = self._pack_decode(plan, num_rows)
        again = batch.pack_decode(plan, buckets, num_rows, batch.NO_EDITS)
        wants_hidden = any(self._feeds_last.get(row.slot) for row in plan.rows)
        states = []
        for step in range(plan.num_steps):
            self._state, logits, hidden = program(self._leaves, self._state, packed)
            drawn += self._draw(plan, samplers, logits, hidden.final, step)
            states += [hidden.reported] * wants_hidden
            packed = again
        return self._handle(plan, drawn, {}, states)

    def _draw(
        self,
        plan: StepPlan,
        samplers: list[LiveSampler],
        logits: jax.Array,
        hidden: jax.Array,
        step: int,
    ) -> list[Drawn]:
        drawn = []
        for sampler in samplers:
            own_rows = (row for row in plan.rows if row.sampler_id == sampler.sampler_id)
            has_lists = any(self._wants_lists.get(row.slot) for row in own_rows)
            kind = DRAW_LISTS if has_lists else DRAW
            key = ProgramKey(kind, len(logits), owner=sampler.steps.owner)
            program = self._program(key, lambda s=sampler.steps: self._factory.split(s))
            assert self._state is not None
            slots, sampler.seats, out = program(
                self._state.slots,
                self._seats(sampler),
                self._state.token_counts,
                sampler.arrays,
                logits,
                hidden,
                batch.pack_draw(plan, len(logits), sampler.sampler_id),
            )
            self._state = dataclasses.replace(self._state, slots=slots)
            sampler.num_split_steps += 1
            drawn.append(Drawn(sampler, out, sampler.steps.result, step, 1))
        return drawn

    def _embeds(self, plan: PrefillPlan) -> Embeds:
        """Embeddings of the plan's tokens that have some of their own."""
        model = self._factory.forward.model
        is_given = np.zeros(plan.num_tokens, bool)
        values = np.zeros((plan.num_tokens, model.config.hidden_size), np.float32)
        start = 0
        for row in plan.rows:
            if row.embeds is not None:
                is_given[start : start + len(row.embeds)] = True
                values[start : start + len(row.embeds)] = row.embeds
            start += len(row.token_ids)
        return Embeds(is_given, values.astype(model.dtype))

    def _wait_for(self, specs: Specs) -> None:
        """Has all of these compiled, at once."""
        self._programs.add(specs, LATER)
        for key in specs:
            self._programs.get(key)

    def _program(
        self, key: ProgramKey, specs: Callable[[], Mapping[ProgramKey, ProgramSpec]]
    ) -> Any:
        """A program the engine did not begin with."""
        if key not in self._programs:
            self._programs.add({key: specs()[key]}, IDLE)
        return self._programs.get(key)

    def _score(self, plan: PrefillPlan, hidden: Hidden) -> dict[str, jax.Array]:
        """What is reported of a prefill's own tokens."""
        reported = {}
        if any(row.targets is not None for row in plan.rows):
            program = self._program(ProgramKey("score", plan.num_tokens), self._factory.scores)
            packed = batch.pack_score(plan, self._factory.forward.buckets, self._logprob_ids)
            reported = program(self._leaves, hidden.final, packed)
        if any(row.states is not None for row in plan.rows):
            reported[HIDDEN] = hidden.reported
        return reported

    def _handle(
        self,
        plan: StepPlan,
        drawn: list[Drawn],
        scores: Mapping[str, jax.Array],
        hidden: list[jax.Array] | None = None,
        *,
        is_demanded: bool = False,
    ) -> StepHandle:
        is_demanded |= any(self._wants_lists.get(row.slot) for row in plan.rows)
        return StepHandle(
            plan, drawn, scores, hidden, is_demanded=is_demanded, weights_id=self._weights_id
        )

    def _note_wishes(self, plan: StepPlan) -> None:
        """Remembers, by slot, what the plans themselves do not say."""
        if isinstance(plan, PrefillPlan):
            for row in plan.new_rows:
                self._wants_lists[row.slot] = row.request.wants_lists
                self._feeds_last[row.slot] = row.request.feeds_last
                self._logprob_ids[row.slot] = row.request.logprob_ids

    def _pack_prefill(self, plan: PrefillPlan, inline: LiveSampler | None) -> np.ndarray:
        """The packed plan; what it has no room for goes ahead in programs of its own.

        Args:
          plan: The prefill.
          inline: The sampler whose edits travel in the plan.
        """
        forward = self._factory.forward
        packing = batch.prefill_packing(forward.buckets, plan.num_tokens)
        seats = batch.NO_EDITS
        for sampler_id in sorted({row.request.sampler_id for row in plan.new_rows}):
            sampler = self._samplers[sampler_id]
            new_rows = [row for row in plan.new_rows if row.request.sampler_id == sampler_id]
            edits = batch.seat_edits(sampler.steps.layout, new_rows)
            if sampler is inline and batch.fits(packing, edits, "seat_"):
                seats = edits
            else:
                self._edit_seats(sampler, edits)
        edits = batch.slot_edits(forward.layout, plan.new_rows, plan.page_writes)
        edits = self._edit_slots(edits, packing)
        return batch.pack_prefill(plan, forward.buckets, edits, seats)

    def _pack_decode(self, plan: DecodePlan, num_rows: int) -> np.ndarray:
        forward = self._factory.forward
        packing = batch.decode_packing(forward.buckets, num_rows)
        edits = batch.slot_edits(forward.layout, [], plan.page_writes)
        return batch.pack_decode(plan, forward.buckets, num_rows, self._edit_slots(edits, packing))

    def _edit_slots(self, edits: batch.Edits, packing: batch.Packing) -> batch.Edits:
        """The edits, if the packing has room for them, else none: then they are made at once."""
        if batch.fits(packing, edits):
            return edits
        admit = self._programs.get(ProgramKey("admit"))
        for piece in batch.split_edits(edits):
            self._state = admit(self._state, piece)
        return batch.NO_EDITS

    def _edit_seats(self, sampler: LiveSampler, edits: batch.Edits) -> None:
        key = ProgramKey("seat", owner=sampler.steps.owner)
        program = self._program(key, lambda: self._factory.edits(sampler.steps, is_cached=False))
        for piece in batch.split_edits(edits):
            sampler.seats = program(self._seats(sampler), piece)

    def _seats(self, sampler: LiveSampler) -> Seats:
        seats = sampler.seats or _zeros(self._factory.seats(sampler.steps))
        sampler.seats = seats
        return seats


def _key(plan: StepPlan, sampler: LiveSampler) -> ProgramKey:
    """The program that runs a plan with this sampler in it."""
    is_prefill = isinstance(plan, PrefillPlan)
    kind, size = ("prefill", plan.num_tokens) if is_prefill else ("decode", plan.num_rows)
    return ProgramKey(kind, size, sampler.steps.owner)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)
