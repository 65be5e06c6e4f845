"""The samplers an engine knows: bound to its shapes, kept while they are in use or recent."""

import dataclasses
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax

from jaxengine.errors import SamplerError
from jaxengine.runtime.decode_loop import SamplerSteps
from jaxengine.runtime.forward import Forward
from jaxengine.runtime.slots import FIELDS
from jaxengine.runtime.state import Seats
from jaxengine.sampling.context import SamplingContext
from jaxengine.sampling.identity import structure_of
from jaxengine.sampling.sampler import Sampler

MAX_RECENT = 32
"""Samplers that are kept although no request uses them."""

RESERVED_NAMES = frozenset(
    {*FIELDS, "token_counts", "narrowed", *(f.name for f in dataclasses.fields(SamplingContext))}
)
"""Names a sampler's parameter cannot have: they mean something else in the context."""


class LiveSampler:
    """A sampler in an engine; requests hold it, so it lives as long as they do.

    Attributes:
      sampler_id: Its own.
      steps: What is compiled; shared with samplers that differ only in `arrays`.
      arrays: The sampler's weights.
      seats: Its device state, which the runner makes when it is first used, and owns.
      num_split_steps: Steps it ran in split form.
      is_stateful: It keeps something of a sequence that cannot be computed anew.
    """

    def __init__(self, sampler_id: int, steps: SamplerSteps, arrays: Any) -> None:
        self.sampler_id = sampler_id
        self.steps = steps
        self.arrays = arrays
        self.seats: Seats | None = None
        self.num_split_steps = 0
        self.is_stateful = bool(jax.tree.leaves(steps.initial_seats.state))


class Samplers:
    """All samplers of an engine. Calls are safe from any thread.

    Equal samplers, whose code and closed-over values are the same, are one: a chain that a
    notebook cell builds anew compiles nothing.
    """

    def __init__(self, forward: Forward, own: Sampler) -> None:
        """Binds the engine's own sampler, for requests that bring none; its ids are 0.

        Raises:
          SamplerError: If the sampler cannot be traced; it names the part.
        """
        self._forward = forward
        self._ids, self._owners = itertools.count(), itertools.count()
        self._lock = threading.RLock()
        self._recent: OrderedDict[Any, LiveSampler] = OrderedDict()
        self._own_key: Any = None
        self._by_id: weakref.WeakValueDictionary[int, LiveSampler] = weakref.WeakValueDictionary()
        self._steps: weakref.WeakValueDictionary[Any, SamplerSteps] = weakref.WeakValueDictionary()
        self.own = self.get(own)
        self._own_key = next(iter(self._recent))

    def __getitem__(self, sampler_id: int) -> LiveSampler:
        return self._by_id[sampler_id]

    def alive(self) -> list[LiveSampler]:
        """Every sampler that may have device state."""
        return list(self._by_id.values())

    def get(
        self,
        sampler: Sampler,
        group_size: int = 1,
        forget: Callable[[int], None] = lambda owner: None,
    ) -> LiveSampler:
        """The sampler bound to this engine, traced now if it is new.

        Args:
          sampler: What a request brings.
          group_size: A prompt and its companions.
          forget: Told the owner of programs that nobody can ask for any more.

        Raises:
          SamplerError: If it cannot be traced; it names the part.
        """
        leaves = jax.tree.leaves(sampler.arrays)
        structure = (structure_of(sampler, leaves), group_size)
        key = (structure, structure_of(leaves))
        with self._lock:
            live = self.own if key == self._own_key else self._recent.get(key)
            if live is None:
                steps = self._steps.get(structure)
                if steps is None:
                    steps = _bind(self._forward, sampler, group_size, next(self._owners))
                    self._steps[structure] = steps
                    weakref.finalize(steps, forget, steps.owner).atexit = False
                live = LiveSampler(next(self._ids), steps, sampler.arrays)
                self._by_id[live.sampler_id] = live
            self._recent[key] = live
            self._recent.move_to_end(key)
            while len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
            return live


def _bind(forward: Forward, sampler: Sampler, group_size: int, owner: int) -> SamplerSteps:
    clash = RESERVED_NAMES & sampler.params.keys()
    if clash:
        raise SamplerError(f"The sampler's parameters use reserved names: {sorted(clash)}.")
    if (sampler.combine is not None) != (group_size > 1):
        raise SamplerError(
            "A sampler with `combine` is for requests with `companions`, and these need one; "
            f"got {group_size - 1} companions and combine={sampler.combine}."
        )
    try:
        with jax.checking_leaks():
            return SamplerSteps.bind(forward, sampler, group_size=group_size, owner=owner)
    except SamplerError:
        raise
    except Exception as error:
        notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
        message = f"The sampler cannot be traced: {type(error).__name__}: {error}{notes}."
        raise SamplerError(message) from error
