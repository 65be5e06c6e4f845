"""A step under way on the device, and what the host reads of it when it has run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxengine.runtime import results
from jaxengine.runtime.samplers import LiveSampler
from jaxengine.scheduler.plan import PrefillPlan, StepPlan, StepResult
from jaxengine.types import HIDDEN


@dataclass(frozen=True)
class Drawn:
    """Results of one draw program, under way.

    Attributes:
      sampler: Who drew.
      arrays: What it gives.
      layout: What is in that.
      first_step: Step of the plan its first token belongs to.
      num_steps: Steps it has room for.
    """

    sampler: LiveSampler
    arrays: results.Results
    layout: results.ResultLayout
    first_step: int
    num_steps: int


class StepHandle:
    """A step under way on the device."""

    def __init__(
        self,
        plan: StepPlan,
        drawn: list[Drawn],
        scores: Mapping[str, jax.Array] = {},
        hidden: list[jax.Array] | None = None,
        *,
        is_demanded: bool = False,
        weights_id: int = 0,
    ) -> None:
        """Starts all copies.

        Args:
          plan: What runs.
          drawn: Results of its draws.
          scores: What is reported of a prefill's tokens.
          hidden: Hidden states of every step of a window in split form, where they are wanted.
          is_demanded: Leaves that are copied on demand are wanted.
          weights_id: Which parameters it uses.
        """
        self.plan = plan
        self._weights_id = weights_id
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
        with jax.profiler.TraceAnnotation(f"read {label(self.plan)}"):
            return self._result()

    def _result(self) -> StepResult:
        parts = [(part, self._unpack(part)) for part in self._drawn]
        if len(parts) == 1:
            leaves = {name: leaf[: len(self.plan.rows)] for name, leaf in parts[0][1].items()}
        else:
            leaves = self._merge(parts)
        if self._hidden:
            num_rows = len(self.plan.rows)
            steps = [np.asarray(array)[:num_rows] for array in self._hidden]
            leaves[HIDDEN] = np.stack(steps, axis=1)
        return StepResult(leaves[results.TOKEN], leaves, self._prompt_leaves(), self._weights_id)

    def _unpack(self, part: Drawn) -> dict[str, np.ndarray]:
        layout = part.layout
        leaves = results.unpack(np.asarray(part.arrays.always), layout.always)
        if self._is_demanded:
            packed = np.asarray(part.arrays.on_demand)
            leaves |= results.unpack(packed, layout.on_demand)
        return leaves

    def _merge(self, parts: list[tuple[Drawn, dict[str, np.ndarray]]]) -> dict[str, Any]:
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


def label(plan: StepPlan) -> str:
    """A step's name in a profile."""
    if isinstance(plan, PrefillPlan):
        return f"prefill_t{plan.num_tokens}"
    return f"decode_b{plan.num_rows}_k{plan.num_steps}"
