"""The one border between host and device: plans go in, results come out, nothing else crosses."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxengine.errors import EngineDeadError, SamplerError
from jaxengine.models.family import Params
from jaxengine.runtime import batch, results
from jaxengine.runtime.decode_loop import Results, SamplerSteps
from jaxengine.runtime.forward import Embeds, Forward, Hidden
from jaxengine.runtime.kv_cache import abstract_kv_cache
from jaxengine.runtime.programs import (
    GPU_WINDOW_OPTIONS,
    IDLE,
    LATER,
    ProgramKey,
    Programs,
    ProgramSpec,
)
from jaxengine.runtime.samplers import LiveSampler, Samplers
from jaxengine.runtime.sharding import kv_sharding, replicated
from jaxengine.runtime.state import COUNT_DTYPE, DeviceState, Seats
from jaxengine.sampling.identity import are_equal
from jaxengine.sampling.sampler import default_sampler
from jaxengine.scheduler.plan import DecodePlan, PrefillPlan, StepPlan, StepResult
from jaxengine.types import HIDDEN

type Specs = dict[ProgramKey, ProgramSpec]

HIDDEN_DECODE = "decode_hidden"
"""Kind of the windows that report hidden states; the others know nothing of them."""

FUSE_AFTER_STEPS = 64
"""Split steps after which a sampler is worth compiling into the window; one tried once is not."""


class ProgramFactory:
    """Describes every program of an engine; arguments are abstract, so no device is needed."""

    def __init__(
        self, forward: Forward, params: Params, mesh: Mesh, num_pages: int, kv_dtype: jnp.dtype
    ) -> None:
        """Args:
        forward: The model's part of the steps.
        params: Abstract parameters, placed on the mesh.
        mesh: Where everything is.
        num_pages: KV pages.
        kv_dtype: Of the KV cache.
        """
        self.forward = forward
        self._params = params
        self._mesh = mesh
        buckets, config = forward.buckets, forward.model.config
        self.state = DeviceState(
            kv_cache=abstract_kv_cache(
                config, num_pages, buckets.page_size, kv_dtype, kv_sharding(mesh)
            ),
            slots=self._array((buckets.num_slots, forward.layout.width), jnp.int32),
            token_counts=self._array((buckets.num_slots, config.vocab_size), COUNT_DTYPE),
        )
        is_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
        self._options = GPU_WINDOW_OPTIONS if is_gpu else {}

    def seats(self, steps: SamplerSteps) -> Seats:
        """Shapes and places of what a sampler keeps."""
        return jax.tree.map(lambda s: self._array(s.shape, s.dtype), steps.initial_seats)

    def first(self) -> tuple[ProgramKey, ...]:
        """Programs that a short first request runs."""
        buckets = self.forward.buckets
        return (
            ProgramKey("prefill", buckets.prefill_tokens[0], buckets.num_pages[0]),
            ProgramKey("decode", buckets.decode_rows[0], buckets.num_pages[0]),
        )

    def first_forwards(self) -> tuple[ProgramKey, ...]:
        """The same for the split form."""
        buckets = self.forward.buckets
        return (
            ProgramKey("forward_prefill", buckets.prefill_tokens[0], buckets.num_pages[0]),
            ProgramKey("forward_decode", buckets.split_rows[0], buckets.num_pages[0]),
        )

    def fused(self, steps: SamplerSteps, *, is_cached: bool) -> dict[ProgramKey, ProgramSpec]:
        """Prefills and windows with a sampler traced into them, and its edits."""
        buckets, owner = self.forward.buckets, steps.owner
        common = (self._params, self.state, self.seats(steps), self._shapes(steps.sampler.arrays))
        specs = self.edits(steps, is_cached=is_cached)
        for pages in buckets.num_pages:
            for tokens in buckets.prefill_tokens:
                specs[ProgramKey("prefill", tokens, pages, owner)] = ProgramSpec(
                    name=f"prefill_t{tokens}_p{pages}",
                    fn=lambda *args, t=tokens, p=pages: steps.prefill(
                        *args, num_tokens=t, num_pages=p
                    ),
                    args=(*common, self._packed(batch.prefill_packing(buckets, tokens))),
                    donate=(1, 2),
                    options=self._options,
                    cost=tokens,
                    is_cached=is_cached,
                )
            for rows in buckets.decode_rows:
                key = ProgramKey("decode", rows, pages, owner)
                specs[key] = self._window(steps, key, common, is_cached=is_cached)
        return specs

    def hidden_windows(self, steps: SamplerSteps, *, is_cached: bool) -> Specs:
        """Windows that report hidden states."""
        buckets = self.forward.buckets
        common = (self._params, self.state, self.seats(steps), self._shapes(steps.sampler.arrays))
        keys = [
            ProgramKey(HIDDEN_DECODE, rows, pages, steps.owner)
            for pages in buckets.num_pages
            for rows in buckets.decode_rows
        ]
        return {key: self._window(steps, key, common, is_cached=is_cached) for key in keys}

    def _window(
        self, steps: SamplerSteps, key: ProgramKey, common: tuple[Any, ...], *, is_cached: bool
    ) -> ProgramSpec:
        return ProgramSpec(
            name=f"{key.kind}_b{key.size}_p{key.num_pages}",
            fn=functools.partial(
                steps.decode,
                num_rows=key.size,
                num_pages=key.num_pages,
                has_hidden=key.kind == HIDDEN_DECODE,
            ),
            args=(*common, self._packed(batch.decode_packing(self.forward.buckets, key.size))),
            donate=(1, 2),
            options=self._options,
            cost=key.size,
            is_cached=is_cached,
        )

    def edits(self, steps: SamplerSteps, *, is_cached: bool) -> dict[ProgramKey, ProgramSpec]:
        """The program that takes edits of a sampler's table."""
        seat = ProgramSpec(
            name="seat",
            fn=steps.seat,
            args=(self.seats(steps), self._packed(batch.edit_packing())),
            donate=(0,),
            is_cached=is_cached,
        )
        return {ProgramKey("seat", owner=steps.owner): seat}

    def split(self, steps: SamplerSteps) -> dict[ProgramKey, ProgramSpec]:
        """Draws over the logits of a forward step, and the sampler's edits."""
        specs = self.edits(steps, is_cached=False)
        seats, arrays = self.seats(steps), self._shapes(steps.sampler.arrays)
        model = self.forward.model
        for rows in self.forward.buckets.split_rows:
            specs[ProgramKey("draw", rows, owner=steps.owner)] = ProgramSpec(
                name=f"draw_b{rows}",
                fn=steps.draw,
                args=(
                    self.state.slots,
                    seats,
                    self.state.token_counts,
                    arrays,
                    self._array((rows, model.config.vocab_size), jnp.float32),
                    self._array((rows, model.config.hidden_size), model.dtype),
                    self._packed(batch.draw_packing(rows)),
                ),
                donate=(0, 1),
                options=self._options,
                is_cached=False,
            )
        return specs

    def admit(self) -> dict[ProgramKey, ProgramSpec]:
        """The program that takes edits of the engine's own table."""
        args = (self.state, self._packed(batch.edit_packing()))
        spec = ProgramSpec(name="admit", fn=self.forward.admit, args=args, donate=(0,))
        return {ProgramKey("admit"): spec}

    def forwards(self) -> dict[ProgramKey, ProgramSpec]:
        """Steps without a sampler, for the split form."""
        specs, forward, buckets = {}, self.forward, self.forward.buckets
        for pages in buckets.num_pages:
            for tokens in buckets.prefill_tokens:
                specs[ProgramKey("forward_prefill", tokens, pages)] = ProgramSpec(
                    name=f"forward_prefill_t{tokens}_p{pages}",
                    fn=lambda *args, t=tokens, p=pages: forward.prefill(
                        *args, num_tokens=t, num_pages=p
                    ),
                    args=(
                        self._params,
                        self.state,
                        self._packed(batch.prefill_packing(buckets, tokens)),
                    ),
                    donate=(1,),
                    options=self._options,
                    cost=tokens,
                )
            for rows in buckets.split_rows:
                specs[ProgramKey("forward_decode", rows, pages)] = ProgramSpec(
                    name=f"forward_decode_b{rows}_p{pages}",
                    fn=lambda *args, r=rows, p=pages: forward.decode(
                        *args, num_rows=r, num_pages=p
                    ),
                    args=(
                        self._params,
                        self.state,
                        self._packed(batch.decode_packing(buckets, rows)),
                    ),
                    donate=(1,),
                    options=self._options,
                    cost=rows,
                )
        return specs

    def embeds(self) -> Specs:
        """Prefills in which embeddings stand for some of the ids, for the split form."""
        specs, forward, model = {}, self.forward, self.forward.model
        for key, spec in self.forwards().items():
            if key.kind != "forward_prefill":
                continue
            values = self._array((key.size, model.config.hidden_size), model.dtype)
            embeds = Embeds(self._array((key.size,), jnp.bool_), values)
            specs[key._replace(kind="embeds_prefill")] = dataclasses.replace(
                spec,
                name=f"embeds_prefill_t{key.size}_p{key.num_pages}",
                fn=lambda *args, k=key: forward.prefill(
                    *args[:3], num_tokens=k.size, num_pages=k.num_pages, embeds=args[3]
                ),
                args=(*spec.args, embeds),
            )
        return specs

    def scores(self) -> dict[ProgramKey, ProgramSpec]:
        """Logprobs of prompt tokens."""
        specs, model, buckets = {}, self.forward.model, self.forward.buckets
        for tokens in buckets.prefill_tokens:
            specs[ProgramKey("score", tokens)] = ProgramSpec(
                name=f"score_t{tokens}",
                fn=lambda *args, t=tokens: self.forward.score(*args, num_tokens=t),
                args=(
                    self._params,
                    self._array((tokens, model.config.hidden_size), model.dtype),
                    self._packed(batch.score_packing(buckets, tokens)),
                ),
                cost=tokens,
            )
        return specs

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(self._mesh))

    def _shapes(self, arrays: Any) -> Any:
        return jax.tree.map(lambda x: self._array(x.shape, x.dtype), arrays)

    def _packed(self, packing: batch.Packing) -> jax.ShapeDtypeStruct:
        return self._array((packing.size,), jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """Results of one draw program, under way.

    Attributes:
      sampler: Who drew.
      arrays: What it gives.
      layout: What is in that.
      first_step: Step of the plan its first token belongs to.
      num_steps: Steps it has room for.
    """

    sampler: LiveSampler
    arrays: Results
    layout: results.ResultLayout
    first_step: int
    num_steps: int


class StepHandle:
    """A step under way on the device."""

    def __init__(
        self,
        plan: StepPlan,
        drawn: list[_Drawn],
        scores: Mapping[str, jax.Array] = {},
        hidden: list[jax.Array] | None = None,
        *,
        is_demanded: bool = False,
    ) -> None:
        """Starts all copies.

        Args:
          plan: What runs.
          drawn: Results of its draws.
          scores: What is reported of a prefill's tokens.
          hidden: Hidden states of every step of a window in split form, where they are wanted.
          is_demanded: Leaves that are copied on demand are wanted.
        """
        self.plan = plan
        self._drawn = drawn
        self._scores = scores
        self._hidden = hidden or []
        self._is_demanded = is_demanded
        for part in drawn:
            part.arrays.always.copy_to_host_async()
            if is_demanded:
                part.arrays.on_demand.copy_to_host_async()
        for array in (*scores.values(), *self._hidden):
            array.copy_to_host_async()

    def result(self) -> StepResult:
        """Waits for the device, and gives what was copied: one copy for the whole step."""
        parts = [(part, self._unpack(part)) for part in self._drawn]
        if len(parts) == 1:
            leaves = {name: leaf[: len(self.plan.rows)] for name, leaf in parts[0][1].items()}
        else:
            leaves = self._merge(parts)
        if self._hidden:
            num_rows = len(self.plan.rows)
            steps = [np.asarray(array)[:num_rows] for array in self._hidden]
            leaves[HIDDEN] = np.stack(steps, axis=1)
        return StepResult(leaves[results.TOKEN], leaves, self._prompt_leaves())

    def _unpack(self, part: _Drawn) -> dict[str, np.ndarray]:
        layout = part.layout
        leaves = results.unpack(np.asarray(part.arrays.always), layout.always, part.num_steps)
        if self._is_demanded:
            packed = np.asarray(part.arrays.on_demand)
            leaves |= results.unpack(packed, layout.on_demand, part.num_steps)
        return leaves

    def _merge(self, parts: list[tuple[_Drawn, dict[str, np.ndarray]]]) -> dict[str, Any]:
        """Steps and samplers of the split form put together; a row's leaves are its sampler's."""
        num_rows = len(self.plan.rows)
        num_steps = max((part.first_step + part.num_steps for part, _ in parts), default=1)
        merged: dict[str, Any] = {results.TOKEN: np.full((num_rows, num_steps), -1, np.int32)}
        for part, leaves in parts:
            is_own = [row.sampler_id == part.sampler.sampler_id for row in self.plan.rows]
            steps = slice(part.first_step, part.first_step + part.num_steps)
            for name, leaf in leaves.items():
                rows = merged.setdefault(name, [np.zeros((num_steps, 0))] * num_rows)
                for i in np.flatnonzero(is_own):
                    if rows[i].shape[1:] != leaf.shape[2:] or rows[i].dtype != leaf.dtype:
                        rows[i] = np.zeros((num_steps, *leaf.shape[2:]), leaf.dtype)
                    rows[i][steps] = leaf[i]
        return merged

    def _prompt_leaves(self) -> dict[str, list[np.ndarray]]:
        if not self._scores or not isinstance(self.plan, PrefillPlan):
            return {}
        ends = np.cumsum([len(row.token_ids) for row in self.plan.rows])[:-1]
        total = sum(len(row.token_ids) for row in self.plan.rows)
        return {
            name: np.split(np.asarray(array)[:total], ends) for name, array in self._scores.items()
        }


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
        self.params = params
        self.reset()

    def reset(self) -> None:
        """Allocates the device state anew: at start, and after a step failed with it donated."""
        self._state = None
        for sampler in self._samplers.alive():
            sampler.seats = None
        self._state = _zeros(self._factory.state)

    def prepare(
        self, sampler: LiveSampler, *, scores: bool, hidden: bool = False, embeds: bool = False
    ) -> None:
        """Waits for programs the engine did not begin with, in the caller's thread: not its own.

        Args:
          sampler: For its first tokens.
          scores: Also for logprobs of prompt tokens.
          hidden: Also for hidden states.
          embeds: Also for embeddings in place of ids.

        Raises:
          SamplerError: If XLA does not compile the sampler.
        """
        factory = self._factory
        if scores:
            for tokens in factory.forward.buckets.prefill_tokens:
                self._program(ProgramKey("score", tokens), factory.scores)
        is_own = sampler is self._samplers.own
        if hidden and is_own:
            is_cached = are_equal(sampler.steps.sampler, default_sampler())
            self._wait_for(factory.hidden_windows(sampler.steps, is_cached=is_cached))
        if embeds:
            self._wait_for(factory.embeds())
        if is_own and not embeds:
            return
        for specs in (factory.split(sampler.steps), {} if is_own else factory.forwards()):
            if any(key not in self._programs for key in specs):
                self._programs.add(specs, IDLE)
        buckets, owner = factory.forward.buckets, sampler.steps.owner
        draws = [ProgramKey("draw", rows, owner=owner) for rows in buckets.split_rows]
        try:
            first = () if is_own else factory.first_forwards()
            for key in (*draws, ProgramKey("seat", owner=owner), *first):
                self._programs.get(key)
        except EngineDeadError:
            raise
        except Exception as error:
            raise SamplerError(f"XLA cannot compile the sampler: {error}") from error

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Hands a plan to the device and returns before it has run."""
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

    def release(self) -> None:
        """Drops every device array."""
        self._state = None
        self.params = None
        for sampler in self._samplers.alive():
            sampler.seats = None

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
            self.params, self._state, self._seats(sampler), sampler.arrays, packed
        )
        drawn = [_Drawn(sampler, out, sampler.steps.result, 0, 1)]
        return self._handle(plan, drawn, self._score(plan, hidden))

    def _run_window(self, plan: DecodePlan, sampler: LiveSampler, kind: str) -> StepHandle:
        has_hidden = kind == HIDDEN_DECODE
        program = self._programs.get(_key(plan, sampler)._replace(kind=kind))
        packed = self._pack_decode(plan, plan.num_rows)
        self._state, sampler.seats, out = program(
            self.params, self._state, self._seats(sampler), sampler.arrays, packed
        )
        num_steps = self._factory.forward.buckets.max_window_steps
        layout = sampler.steps.window_result(has_hidden=has_hidden)
        drawn = [_Drawn(sampler, out, layout, 0, num_steps)]
        return self._handle(plan, drawn, {}, is_demanded=has_hidden)

    def _run_split(self, plan: StepPlan, samplers: list[LiveSampler]) -> StepHandle:
        drawn: list[_Drawn] = []
        if isinstance(plan, PrefillPlan):
            kind, specs, extra = "forward_prefill", self._factory.forwards, ()
            if any(row.embeds is not None for row in plan.rows):
                kind, specs, extra = "embeds_prefill", self._factory.embeds, (self._embeds(plan),)
            program = self._program(ProgramKey(kind, plan.num_tokens, plan.num_pages), specs)
            packed = self._pack_prefill(plan, None)
            self._state, logits, last, hidden = program(self.params, self._state, packed, *extra)
            drawn += self._draw(plan, samplers, logits, last, 0)
            return self._handle(plan, drawn, self._score(plan, hidden))
        buckets = self._factory.forward.buckets
        num_rows = min(rows for rows in buckets.split_rows if rows >= len(plan.rows))
        key = ProgramKey("forward_decode", num_rows, plan.num_pages)
        program = self._program(key, self._factory.forwards)
        packed = self._pack_decode(plan, num_rows)
        again = batch.pack_decode(plan, buckets, num_rows, batch.NO_EDITS)
        wants_hidden = any(self._feeds_last.get(row.slot) for row in plan.rows)
        states = []
        for step in range(plan.num_steps):
            self._state, logits, hidden = program(self.params, self._state, packed)
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
    ) -> list[_Drawn]:
        drawn = []
        for sampler in samplers:
            key = ProgramKey("draw", len(logits), owner=sampler.steps.owner)
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
            drawn.append(_Drawn(sampler, out, sampler.steps.result, step, 1))
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
            self._programs.add(specs(), IDLE)
        return self._programs.get(key)

    def _score(self, plan: PrefillPlan, hidden: Hidden) -> dict[str, jax.Array]:
        """What is reported of a prefill's own tokens."""
        reported = {}
        if any(row.targets is not None for row in plan.rows):
            program = self._program(ProgramKey("score", plan.num_tokens), self._factory.scores)
            packed = batch.pack_score(plan, self._factory.forward.buckets, self._logprob_ids)
            reported = program(self.params, hidden.final, packed)
        if any(row.states is not None for row in plan.rows):
            reported[HIDDEN] = hidden.reported
        return reported

    def _handle(
        self,
        plan: StepPlan,
        drawn: list[_Drawn],
        scores: Mapping[str, jax.Array],
        hidden: list[jax.Array] | None = None,
        *,
        is_demanded: bool = False,
    ) -> StepHandle:
        is_demanded |= any(self._wants_lists.get(row.slot) for row in plan.rows)
        return StepHandle(plan, drawn, scores, hidden, is_demanded=is_demanded)

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
    return ProgramKey(kind, size, plan.num_pages, sampler.steps.owner)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)
