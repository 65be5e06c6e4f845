"""The one border between host and device: plans go in, results come out, nothing else crosses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxengine.models.family import Params
from jaxengine.runtime import batch
from jaxengine.runtime.decode_loop import COUNT_DTYPE, DeviceState, Steps
from jaxengine.runtime.kv_cache import abstract_kv_cache
from jaxengine.runtime.programs import GPU_WINDOW_OPTIONS, ProgramKey, Programs, ProgramSpec
from jaxengine.runtime.sharding import kv_sharding, replicated
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.plan import PrefillPlan, StepPlan, StepResult

ADMIT: ProgramKey = ("admit", 0, 0)
"""Key of the program that takes edits too many for a plan."""


def program_key(plan: StepPlan) -> ProgramKey:
    """The program a plan runs."""
    if isinstance(plan, PrefillPlan):
        return ("prefill", plan.num_tokens, plan.num_pages)
    return ("decode", plan.num_rows, plan.num_pages)


def first_programs(buckets: Buckets) -> tuple[ProgramKey, ...]:
    """Programs that a short first request runs."""
    pages = buckets.num_pages[0]
    return (
        ("prefill", buckets.prefill_tokens[0], pages),
        ("decode", buckets.decode_rows[0], pages),
    )


def abstract_state(steps: Steps, mesh: Mesh, num_pages: int, kv_dtype: jnp.dtype) -> DeviceState:
    """Shapes and places of the device state."""
    everywhere = replicated(mesh)
    buckets, config = steps.buckets, steps.model.config

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    return DeviceState(
        kv_cache=abstract_kv_cache(
            config, num_pages, buckets.page_size, kv_dtype, kv_sharding(mesh)
        ),
        slots=array((buckets.num_slots, steps.layout.width), jnp.int32),
        token_counts=array((buckets.num_slots, config.vocab_size), COUNT_DTYPE),
        sampler=jax.tree.map(lambda s: array(s.shape, s.dtype), steps.initial_sampler_state()),
    )


def program_specs(
    steps: Steps, params: Params, state: DeviceState, mesh: Mesh
) -> dict[ProgramKey, ProgramSpec]:
    """Every program of an engine, by key; arguments are abstract, so no device is needed.

    Args:
      steps: What to compile.
      params: Abstract parameters, placed on the mesh.
      state: `abstract_state`.
      mesh: Where the packed plans go.
    """
    buckets = steps.buckets
    is_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    options = GPU_WINDOW_OPTIONS if is_gpu else {}

    def packed(packing: batch.Packing) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((packing.size,), jnp.int32, sharding=replicated(mesh))

    specs = {
        ADMIT: ProgramSpec(
            name="admit", fn=steps.admit, args=(state, packed(batch.admit_packing())), donate=(0,)
        )
    }
    for pages in buckets.num_pages:
        for tokens in buckets.prefill_tokens:
            specs["prefill", tokens, pages] = ProgramSpec(
                name=f"prefill_t{tokens}_p{pages}",
                fn=lambda *args, t=tokens, p=pages: steps.prefill(*args, num_tokens=t, num_pages=p),
                args=(params, state, packed(batch.prefill_packing(buckets, tokens))),
                donate=(1,),
                options=options,
                cost=tokens,
            )
        for rows in buckets.decode_rows:
            specs["decode", rows, pages] = ProgramSpec(
                name=f"decode_b{rows}_p{pages}",
                fn=lambda *args, r=rows, p=pages: steps.decode(*args, num_rows=r, num_pages=p),
                args=(params, state, packed(batch.decode_packing(buckets, rows))),
                donate=(1,),
                options=options,
                cost=rows,
            )
    return specs


class StepHandle:
    """A step under way on the device."""

    def __init__(self, plan: StepPlan, array: jax.Array, num_steps: int) -> None:
        self.plan = plan
        self._array = array
        self._num_steps = num_steps

    def result(self) -> StepResult:
        """Waits for the device and copies the result: one copy for the whole step."""
        token_ids, logprobs = np.split(np.asarray(self._array), 2)
        rows = slice(len(self.plan.rows))
        return StepResult(
            token_ids.reshape(-1, self._num_steps)[rows],
            logprobs.view(np.float32).reshape(-1, self._num_steps)[rows],
        )


class Runner:
    """Owns the device state, and is the only one who calls compiled programs."""

    def __init__(
        self, steps: Steps, params: Params, state: DeviceState, programs: Programs
    ) -> None:
        self._steps = steps
        self._abstract_state = state
        self._programs = programs
        self._state: DeviceState | None = None
        self.params = params
        self.reset()

    def reset(self) -> None:
        """Allocates the device state anew: at start, and after a step failed with it donated."""
        self._state = None

        def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

        self._state = jax.tree.map(zeros, self._abstract_state)

    def dispatch(self, plan: StepPlan) -> StepHandle:
        """Hands a plan to the device and returns before it has run."""
        program = self._programs.get(program_key(plan))
        layout, buckets = self._steps.layout, self._steps.buckets
        new_rows = plan.new_rows if isinstance(plan, PrefillPlan) else []
        edits = batch.collect_edits(layout, new_rows, plan.page_writes)
        packed = batch.pack(plan, buckets, edits)
        if packed is None:
            admit = self._programs.get(ADMIT)
            for piece in batch.split_edits(edits):
                self._state = admit(self._state, batch.pack_edits(piece))
            packed = batch.pack(plan, buckets, batch.NO_EDITS)
        self._state, result = program(self.params, self._state, packed)
        result.copy_to_host_async()
        num_steps = 1 if isinstance(plan, PrefillPlan) else buckets.max_window_steps
        return StepHandle(plan, result, num_steps)

    def release(self) -> None:
        """Drops every device array."""
        self._state = None
        self.params = None
