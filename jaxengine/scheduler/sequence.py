"""One sample of one prompt while it lives in the engine: counters, pages, tokens."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import numpy as np

from jaxengine.scheduler.plan import DecodeRow, PageWrites
from jaxengine.scheduler.prefix_cache import Prefix
from jaxengine.types import SequenceRequest, SequenceUpdate, StopReason


class Status(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    PREFILLING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(kw_only=True, eq=False)
class Member:
    """What a sequence has on the device: one of them, and one more for each companion.

    Attributes:
      request: The leader's request, or a companion's.
      slot: Its row on the device; kept while preempted, with all that is in it.
      row: What stands for it in decode windows; of one that was started.
      is_filled: The slot has been filled for this member, or is in a step under way.
      pages: KV pages in the order of the text.
      num_table: How many of them are in the slot's page table.
      prefix: How much of the text stands in the prefix cache, and is held there for this member.
      num_prefilled: Tokens of the text whose K/V is in them, or will be after what is under way.
    """

    request: SequenceRequest
    slot: int | None = None
    row: DecodeRow | None = None
    is_filled: bool = False
    pages: list[int] = field(default_factory=list)
    num_table: int = 0
    prefix: Prefix | None = None
    num_prefilled: int = 0

    @property
    def held_slot(self) -> int:
        """`slot`, of a member that was started."""
        assert self.slot is not None, f"sequence {self.request.seq_id} was never started"
        return self.slot

    @property
    def held_row(self) -> DecodeRow:
        """`row`, of a member that was started."""
        assert self.row is not None, f"sequence {self.request.seq_id} was never started"
        return self.row

    def write_pages(self, writes: PageWrites) -> None:
        """Adds what its page table lacks."""
        writes.add(self.held_slot, self.num_table, self.pages[self.num_table :])
        self.num_table = len(self.pages)


@dataclass(kw_only=True, eq=False)
class Sequence:
    """Host state of a sequence; the scheduler is its only owner.

    The device runs ahead of the host by the steps in flight, so there are two counts of output
    tokens: `len(output_ids)` is known, `num_scheduled` is the most there can be once everything
    in flight has run.

    Attributes:
      request: What was asked.
      arrival: How many sequences came before.
      members: Itself, then its companions, which have other prompts and the same output.
      status: Where it stands.
      output_ids: Tokens the host knows, int32.
      num_scheduled: Upper bound of generated tokens after all steps in flight.
      num_in_flight: Rows dispatched and not yet committed.
      num_retractions: How often it was preempted.
      was_started: It has run before.
      is_overdue: Too many later ones were faster, so it is first now, and stays when it runs.
      cached_tokens: Prompt tokens that were not computed when it first started.
      next_target: The first prompt token whose logprob no step was asked for yet.
      first_unscored: The same, of steps that were committed.
      next_state: The first prompt token whose hidden state is wanted and no step was asked for yet.
      first_stateless: The same, of steps that were committed.
      ending: How it ends as soon as the hidden state of its last token is there.
    """

    request: SequenceRequest
    arrival: int = 0
    members: list[Member] = field(init=False)
    status: Status = Status.WAITING
    output_ids: array = field(default_factory=lambda: array("i"))
    num_scheduled: int = 0
    num_in_flight: int = 0
    num_retractions: int = 0
    was_started: bool = False
    is_overdue: bool = False
    cached_tokens: int = 0
    next_target: int = 0
    first_unscored: int = 0
    next_state: int = 0
    first_stateless: int = 0
    ending: StopReason | None = None

    def __post_init__(self) -> None:
        self.members = [Member(request=r) for r in (self.request, *self.request.companions)]
        start, length = self.request.logprob_start, len(self.request.prompt_ids)
        self.next_target = self.first_unscored = length if start is None else max(1, start)
        first_states: dict[Any, int] = {None: length, "last": length - 1}
        first_state = first_states.get(self.request.hidden_states, 0)
        self.next_state = self.first_stateless = first_state

    @property
    def seq_id(self) -> int:
        """Its id."""
        return self.request.seq_id

    @property
    def leader(self) -> Member:
        """The member that draws."""
        return self.members[0]

    @property
    def num_left(self) -> int:
        """Tokens that may still be scheduled; a limit of 0 draws one, and drops it.

        One whose last token is fed, too, has a step more, which draws nothing.
        """
        return max(1, self.request.max_new_tokens) + self.request.feeds_last - self.num_scheduled

    @property
    def num_slots_wanted(self) -> int:
        """Slots it lacks."""
        return sum(member.slot is None for member in self.members)

    @property
    def is_bound_to_slots(self) -> bool:
        """The state its sampler has in them cannot be had again."""
        return self.request.is_stateful and bool(self.output_ids)

    @property
    def is_drawn_by_prefill(self) -> bool:
        """The prefill draws the first token; companions draw it together, in a decode window."""
        return not self.output_ids and len(self.members) == 1

    def text(self, member: Member) -> np.ndarray:
        """A member's tokens as far as they are known."""
        prompt = member.request.prompt_ids
        if not self.output_ids:
            return prompt
        return np.concatenate([prompt, np.frombuffer(self.output_ids, np.int32)])

    def prefill_len(self, member: Member) -> int:
        """Tokens to compute before it can decode: the text, but for its last token where that is
        fed to the first decode step."""
        text_len = len(member.request.prompt_ids) + len(self.output_ids)
        return text_len if self.is_drawn_by_prefill else max(1, text_len - 1)

    def num_written(self, member: Member) -> int:
        """Known tokens that are in the pages, or will be after what is under way.

        The last one is still to be fed, or has been, or is fed a second time; so it never counts
        but where the prefill draws.
        """
        if self.is_drawn_by_prefill:
            return member.num_prefilled
        most = len(member.request.prompt_ids) + len(self.output_ids) - 1
        return most if self.status is Status.RUNNING else min(member.num_prefilled, most)

    def max_cached(self, member: Member) -> int:
        """Tokens the prefix cache may serve: not the last to compute, and none of those whose
        hidden states are wanted, or the wanted prompt logprobs come from."""
        most = self.prefill_len(member) - 1
        if member is not self.leader:
            return most
        if self.next_target < len(member.request.prompt_ids):
            most = min(most, self.next_target - 1)
        if self.next_state < len(member.request.prompt_ids):
            most = min(most, self.next_state)
        return most

    def take_targets(self, start: int, count: int) -> np.ndarray | None:
        """The tokens whose logprobs a chunk of the prompt must bring; each is asked for once."""
        prompt = self.request.prompt_ids
        first, end = max(start + 1, self.next_target), min(start + count + 1, len(prompt))
        if first >= end:
            return None
        targets = np.full(count, -1, np.int32)
        targets[first - start - 1 : end - start - 1] = prompt[first:end]
        self.next_target = end
        return targets

    def take_states(self, start: int, count: int) -> slice | None:
        """Which tokens of a chunk must report their hidden state; each is asked for once."""
        first, end = max(start, self.next_state), start + count
        end = min(end, len(self.request.prompt_ids))
        if first >= end:
            return None
        self.next_state = end
        return slice(first - start, end - start)

    def embeds(self, start: int, count: int) -> np.ndarray | None:
        """What a chunk has instead of embeddings of its ids; outputs have ids."""
        embeds = self.request.embeds
        return None if embeds is None or start >= len(embeds) else embeds[start : start + count]

    def last_update(
        self,
        token_ids: Iterable[int] = (),
        leaves: Mapping[str, np.ndarray] = {},
        prompt_leaves: Mapping[str, np.ndarray] = {},
        finish: StopReason | None = None,
        error: Exception | None = None,
        weights_id: int = 0,
    ) -> SequenceUpdate:
        """The update that ends it."""
        counts = self.cached_tokens, self.num_retractions
        new = [*token_ids], leaves, prompt_leaves
        return SequenceUpdate(self.seq_id, *new, finish, error, *counts, weights_id)
