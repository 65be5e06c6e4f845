"""Who waits and who runs, and which slots and pages they have. The one owner of all of these."""

from dataclasses import dataclass, field

from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.plan import DecodeRow
from jaxengine.scheduler.policy import Policy, WaitingQueue
from jaxengine.scheduler.prefix_cache import Match, PrefixCache
from jaxengine.scheduler.sequence import Member, Sequence, Status


@dataclass
class SchedulerStats:
    """Counts since the start; `engine.stats()` shows them.

    Attributes:
      num_windows: Decode windows.
      num_window_steps: Steps of them.
      window_sizes: How many had so many steps.
      num_decode_rows: Rows of them that were sequences'.
      num_decode_padding: Rows that were nobody's.
      num_row_steps: Steps times rows: tokens they could have drawn.
      num_masked_row_steps: Those that drew none, for their row had ended.
      num_prefills: Prefills.
      num_prefill_tokens: Tokens they computed.
      num_prefill_padding: Places for tokens that were nobody's.
      num_prompt_tokens: Tokens of the prompts that were started.
      num_cached_tokens: Those of them the prefix cache had.
      num_generated_tokens: Tokens drawn.
      num_retractions: Preemptions.
      num_finished: Sequences that ended, one way or another.
    """

    num_windows: int = 0
    num_window_steps: int = 0
    window_sizes: dict[int, int] = field(default_factory=dict)
    num_decode_rows: int = 0
    num_decode_padding: int = 0
    num_row_steps: int = 0
    num_masked_row_steps: int = 0
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    num_prefill_padding: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_retractions: int = 0
    num_finished: int = 0


class Roster:
    """Moves sequences between waiting, running and gone, with their slots and pages."""

    def __init__(
        self, buckets: Buckets, pool: PagePool, policy: Policy, *, has_prefix_cache: bool
    ) -> None:
        self.buckets = buckets
        self.policy = policy
        self.cache = PrefixCache(pool, buckets.page_size, is_enabled=has_prefix_cache)
        self.waiting = WaitingQueue(policy)
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._free_slots = list(range(buckets.num_slots))[::-1]
        self._num_arrived = 0

    def add(self, sequence: Sequence) -> None:
        """Lets a new sequence wait."""
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self.waiting.push(sequence)

    @property
    def num_free_slots(self) -> int:
        """Slots nobody has."""
        return len(self._free_slots)

    @property
    def num_idle_slots(self) -> int:
        """Slots of sequences that wait: they were preempted."""
        num_running = sum(len(sequence.members) for sequence in self.running)
        return self.buckets.num_slots - self.num_free_slots - num_running

    def num_pages(self, num_tokens: int) -> int:
        """Pages of so many tokens."""
        return -(-num_tokens // self.buckets.page_size)

    def match(self, sequence: Sequence) -> list[Match]:
        """What the prefix cache has of the texts of a sequence's members."""
        return [
            self.cache.match(m.request.cache_namespace, sequence.text(m), sequence.max_cached(m))
            for m in sequence.members
        ]

    def in_order(self) -> list[Sequence]:
        """Those who wait, the next first."""
        return self.waiting.in_order(lambda s: len(self.match(s)[0].pages))

    def pages_ahead(self, sequence: Sequence) -> int:
        """Pages a sequence may take in the next two windows."""
        ahead = min(2 * self.buckets.max_window_steps, sequence.num_left)
        return self.num_pages(ahead) * len(sequence.members)

    def reserved_pages(self) -> int:
        """Pages those who run will soon want; a newcomer who had them would lose them again."""
        return sum(self.pages_ahead(sequence) for sequence in self.running)

    def to_prefill(self, most: int) -> tuple[int, int]:
        """Prompt tokens that could be computed now, up to `most`, and prompts they are of.

        Some may prove to be cached.
        """
        left = [
            sequence.prefill_len(member) - member.num_prefilled
            for sequence in self.running
            if sequence.status is Status.PREFILLING
            for member in sequence.members
        ]
        num_tokens, num_slots = sum(left), self.num_free_slots
        for sequence in self.waiting:
            num_slots -= sequence.num_slots_wanted
            if num_tokens >= most or num_slots < 0:
                break
            left += [sequence.prefill_len(member) for member in sequence.members]
            num_tokens += sum(left[-len(sequence.members) :])
        return min(num_tokens, most), len(left)

    def has_slots(self, sequence: Sequence) -> bool:
        """There are slots for all members that have none."""
        return sequence.num_slots_wanted <= self.num_free_slots

    def pages_to_start(self, sequence: Sequence, matches: list[Match]) -> int:
        """Pages it takes from those available: for the texts of all members and a first token."""
        return sum(
            self.num_pages(sequence.prefill_len(member) + 1) - len(match.pages) + match.num_unused
            for member, match in zip(sequence.members, matches, strict=True)
        )

    def start(self, sequence: Sequence, matches: list[Match]) -> None:
        """Gives a waiting sequence slots, and pages for its text."""
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.status = Status.PREFILLING
        sequence.num_scheduled = len(sequence.output_ids)
        for member, match in zip(sequence.members, matches, strict=True):
            self.cache.hold(match.prefix)
            member.prefix, member.pages, member.num_table = match.prefix, match.pages, 0
            member.num_prefilled = len(match.pages) * self.buckets.page_size
        sampler_id = sequence.request.sampler_id
        for i, member in enumerate(sequence.members):
            if member.slot is None:
                member.slot = self._free_slots.pop()
            member.row = DecodeRow(member.request.seq_id, member.slot, sampler_id, i)
            self.grow(member, sequence.prefill_len(member))
        if not sequence.was_started:
            sequence.was_started = True
            sequence.cached_tokens = sequence.leader.num_prefilled
            self.stats.num_cached_tokens += sequence.cached_tokens
            self.stats.num_prompt_tokens += len(sequence.request.prompt_ids)

    def grow(self, member: Member, num_tokens: int) -> None:
        """Gives a member pages for so many tokens in all."""
        missing = self.num_pages(num_tokens) - len(member.pages)
        member.pages += self.cache.allocate(max(0, missing))

    def keep(self, sequence: Sequence, member: Member) -> None:
        """Caches the pages a member's prefill has filled."""
        assert member.prefix is not None
        text, num_known = sequence.text(member), sequence.num_written(member)
        member.prefix = self.cache.extend(member.prefix, text, member.pages, num_known)

    def preempt(self, sequence: Sequence, *, keeps_slots: bool = True) -> None:
        """Takes the pages away; the sequence is computed anew in its turn.

        Its slots stay its own, with all that is in them, unless somebody needs them more.
        """
        self.running.remove(sequence)
        self._release_pages(sequence)
        if not keeps_slots:
            self.take_slots(sequence)
        sequence.status = Status.WAITING
        sequence.num_retractions += 1
        self.stats.num_retractions += 1
        self.waiting.push(sequence)

    def take_slots(self, sequence: Sequence) -> None:
        """Takes slots away, and what is in them; the device must be told all of it again."""
        for member in sequence.members:
            if member.slot is not None:
                self._free_slots.append(member.slot)
            member.slot, member.is_filled = None, False

    def retire(self, sequence: Sequence) -> None:
        """Ends a sequence; what it has is free at once."""
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._release_pages(sequence)
        self.take_slots(sequence)
        sequence.status = Status.FINISHED
        self.stats.num_finished += 1

    def forget_device(self) -> None:
        """After all that was on the device is lost: everyone waits again, and nothing is cached."""
        for sequence in self.running[::-1]:
            self.preempt(sequence)
        for sequence in self.waiting:
            sequence.num_in_flight = 0
            sequence.next_target = sequence.first_unscored
            sequence.next_state = sequence.first_stateless
            for member in sequence.members:
                member.is_filled = False
        self.cache.flush()

    def check_integrity(self) -> None:
        """Asserts that pages and slots are each held once, and by those who run."""
        assert all(not m.pages for s in self.waiting for m in s.members), "pages of one who waits"
        users = [(m.prefix, m.pages) for s in self.running for m in s.members if m.prefix]
        self.cache.check_integrity(users)
        members = [m for s in (*self.running, *self.waiting) for m in s.members]
        slots = [m.slot for m in members if m.slot is not None] + self._free_slots
        assert sorted(slots) == list(range(self.buckets.num_slots)), "slots do not add up"

    def _release_pages(self, sequence: Sequence) -> None:
        """Gives the pages back; what is full of known tokens stays cached."""
        for member in sequence.members:
            assert member.prefix is not None
            text, num_known = sequence.text(member), sequence.num_written(member)
            self.cache.release(member.prefix, text, member.pages, num_known)
            member.prefix, member.pages = None, []
