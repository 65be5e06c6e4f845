"""Who is next: the order of those who wait. Knows nothing of slots and pages."""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jaxengine.scheduler.sequence import Sequence

MAX_OVERTAKEN = 64
"""After so many later ones have started before it, a sequence is next, whatever the policy."""

MAX_MATCHED = 128
"""With more than so many waiting, "lpm" is "fcfs": matching all of them would take too long."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Settings of the order, under SGLang's names where it has them.

    Attributes:
      schedule_policy: "fcfs", first come first served; "lpm", longest cached prefix first; or
        "priority", highest priority first, which may preempt those that run.
      preemption_threshold: A running sequence is preempted for one whose priority is better by at
        least so much; None for never.
      low_values_first: Low priorities are the better ones.
    """

    schedule_policy: str = "fcfs"
    preemption_threshold: int | None = 10
    low_values_first: bool = False

    @property
    def has_priorities(self) -> bool:
        """Priorities count."""
        return self.schedule_policy == "priority"

    def urgency(self, sequence: Sequence) -> int:
        """Its priority, so that more is better; the same for all where priorities do not count."""
        if not self.has_priorities:
            return 0
        priority = sequence.request.priority
        return -priority if self.low_values_first else priority

    def rank(self, sequence: Sequence) -> tuple[bool, int, int]:
        """Place in the order; the least is first, and the last to be preempted."""
        return not sequence.is_overdue, -self.urgency(sequence), sequence.arrival

    def may_preempt(self, newcomer: Sequence, sequence: Sequence) -> bool:
        """So much more urgent is the newcomer that the other must go."""
        if self.preemption_threshold is None or sequence.is_overdue:
            return False
        gap = self.urgency(newcomer) - self.urgency(sequence)
        return gap >= max(1, self.preemption_threshold)


class WaitingQueue:
    """Sequences that wait to run, for the first time or again."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._sequences: list[Sequence] = []
        self._num_gone = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def push(self, sequence: Sequence) -> None:
        """Lets a sequence wait; one that was preempted stands where it stood before."""
        rank = self._policy.rank
        if not self._sequences or rank(self._sequences[-1]) < rank(sequence):
            self._sequences.append(sequence)
        else:
            insort(self._sequences, sequence, key=rank)

    def remove(self, sequence: Sequence) -> None:
        """Lets a sequence go: it runs now, or has ended."""
        self._sequences.remove(sequence)
        if not sequence.was_started:
            sequence.is_overdue = self._has_waited_long(sequence)
            self._num_gone += 1

    def _has_waited_long(self, sequence: Sequence) -> bool:
        return self._num_gone - sequence.arrival >= MAX_OVERTAKEN

    def in_order(self, cached_len: Callable[[Sequence], int]) -> list[Sequence]:
        """All who wait, the next first.

        Args:
          cached_len: Tokens of a sequence the prefix cache has.
        """
        if self._policy.schedule_policy == "fcfs":
            return self._sequences.copy()
        overdue = {s for s in self._sequences if s.is_overdue or self._has_waited_long(s)}
        others = [s for s in self._sequences if s not in overdue]
        if self._policy.schedule_policy == "lpm" and len(others) <= MAX_MATCHED:
            others.sort(key=lambda s: (not s.was_started, -cached_len(s)))
        return sorted(overdue, key=lambda s: s.arrival) + others
