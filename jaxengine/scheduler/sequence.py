"""One sample of one prompt while it lives in the engine: counters, pages, tokens."""

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from jaxengine.types import SequenceRequest


class Status(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    PREFILLING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Host state of a sequence; the scheduler is its only owner.

    The device runs ahead of the host by the steps in flight, so there are two counts of output
    tokens: `len(output_ids)` is known, `num_scheduled` is the most there can be once everything
    in flight has run.

    Attributes:
      request: What was asked.
      status: Where it stands.
      slot: Its row on the device; kept while preempted, so that sampler state survives.
      pages: KV pages it holds.
      output_ids: Tokens the host knows.
      logprobs: Their logprobs, when asked for.
      num_prefilled: Tokens whose prefill has been dispatched.
      num_scheduled: Upper bound of generated tokens after all steps in flight.
      num_in_flight: Steps dispatched and not yet committed.
      num_retractions: How often it was preempted.
    """

    request: SequenceRequest
    status: Status = Status.WAITING
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_prefilled: int = 0
    num_scheduled: int = 0
    num_in_flight: int = 0
    num_retractions: int = 0

    @property
    def seq_id(self) -> int:
        """Its id."""
        return self.request.seq_id

    @property
    def held_slot(self) -> int:
        """`slot`, of a sequence that was admitted."""
        assert self.slot is not None, f"sequence {self.seq_id} was never admitted"
        return self.slot

    @property
    def prefill_len(self) -> int:
        """Tokens to compute before it can decode: the prompt, and after a preemption also the
        known outputs but the last, which is fed to the first decode step."""
        return len(self.request.prompt_ids) + max(0, len(self.output_ids) - 1)

    @property
    def num_left(self) -> int:
        """Tokens that may still be scheduled."""
        return self.request.max_new_tokens - self.num_scheduled

    def prefill_tokens(self, start: int, count: int) -> np.ndarray:
        """`count` tokens of the text so far, from `start`."""
        tokens = self.request.prompt_ids
        if self.output_ids:
            tokens = np.concatenate([tokens, np.asarray(self.output_ids[:-1], np.int32)])
        return tokens[start : start + count]
