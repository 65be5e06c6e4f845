"""Plans prefills: whose prompts, in which chunks, packed into one call."""

from jaxengine.scheduler.buckets import IsReady
from jaxengine.scheduler.plan import NewRow, PageWrites, PrefillPlan, PrefillRow
from jaxengine.scheduler.prefix_cache import Key, Match
from jaxengine.scheduler.roster import Roster
from jaxengine.scheduler.sequence import Member, Sequence, Status

STREAM_CHUNK_TOKENS = 2048
"""Most tokens of a prefill while someone reads a running stream, which waits for it."""

MAX_DEFERRED = 256
"""Waiting sequences a plan looks past, at most, for it computes what they will find cached."""


class PrefillDraft:
    """One prefill in the making. What it computes is cached for later plans, not for itself."""

    def __init__(self, roster: Roster, max_tokens: int) -> None:
        """Starts with no rows.

        Args:
          roster: Who is there.
          max_tokens: Packed length it may have at most.
        """
        self._roster = roster
        self._budget = min(max_tokens, roster.buckets.prefill_tokens[-1])
        self._max_rows = roster.buckets.prefill_rows(self._budget)
        self._rows: list[PrefillRow] = []
        self._placed: list[tuple[Sequence, Member]] = []
        self._new_rows: list[NewRow] = []
        self._page_writes = PageWrites.none()
        self._computing: set[Key] = set()

    def plan(self, is_ready: IsReady) -> PrefillPlan | None:
        """Takes in the rest of running prompts, then those who wait; None if there is nobody."""
        for sequence in self._roster.running:
            if sequence.status is Status.PREFILLING:
                self._take(sequence)
        if self._roster.waiting:
            self._start_waiting()
        if not self._rows:
            return None
        for sequence, member in self._placed:
            self._roster.keep(sequence, member)
        return self._finished(is_ready)

    @property
    def _is_full(self) -> bool:
        return not self._budget or len(self._rows) == self._max_rows

    def _start_waiting(self) -> None:
        """Starts sequences in the order of the policy, up to the first that finds no pages.

        Only these are looked past: one whose next page is being computed in this very plan, for it
        will find the page cached in the next; and where slots are short, all who have none.
        """
        num_deferred, reserved = 0, self._roster.reserved_pages()
        for sequence in self._roster.in_order():
            # A preempted sequence must first learn the tokens still in flight.
            if self._is_full or num_deferred > MAX_DEFERRED or sequence.num_in_flight:
                return
            if not self._roster.has_slots(sequence):
                if not self._roster.num_idle_slots:
                    return
                continue
            matches = self._roster.match(sequence)
            if self._is_being_computed(sequence, matches):
                num_deferred += 1
                continue
            needed = self._roster.pages_to_start(sequence, matches)
            if needed + reserved > self._roster.cache.num_available:
                return
            self._roster.start(sequence, matches)
            reserved += self._roster.pages_ahead(sequence)
            self._take(sequence)

    def _is_being_computed(self, sequence: Sequence, matches: list[Match]) -> bool:
        cache = self._roster.cache
        keys = (
            cache.next_page(match.prefix, sequence.text(member), sequence.max_cached(member))
            for member, match in zip(sequence.members, matches, strict=True)
        )
        return any(key in self._computing for key in keys)

    def _take(self, sequence: Sequence) -> None:
        """Adds the next chunks of a sequence, as far as there is room."""
        for member in sequence.members:
            left = sequence.prefill_len(member) - member.num_prefilled
            if left and not self._is_full:
                self._rows.append(self._chunk(sequence, member, min(left, self._budget)))
                self._placed.append((sequence, member))
        if all(m.num_prefilled == sequence.prefill_len(m) for m in sequence.members):
            sequence.num_scheduled += sequence.is_drawn_by_prefill
            sequence.status = Status.RUNNING

    def _chunk(self, sequence: Sequence, member: Member, count: int) -> PrefillRow:
        assert member.prefix is not None
        text, length = sequence.text(member), sequence.prefill_len(member)
        key = self._roster.cache.next_page(member.prefix, text, length)
        if key is not None:
            self._computing.add(key)
        if not member.is_filled:
            outputs = tuple(sequence.output_ids)
            self._new_rows.append(NewRow(member.held_slot, member.request, outputs))
            member.is_filled = True
        member.write_pages(self._page_writes)
        start = member.num_prefilled
        member.num_prefilled += count
        self._budget -= count
        is_leader = member is sequence.leader
        return PrefillRow(
            seq_id=member.request.seq_id,
            slot=member.held_slot,
            token_ids=text[start : start + count],
            start=start,
            draws=start + count == length and sequence.is_drawn_by_prefill,
            sampler_id=sequence.request.sampler_id,
            targets=sequence.take_targets(start, count) if is_leader else None,
            states=sequence.take_states(start, count) if is_leader else None,
            embeds=sequence.embeds(start, count) if is_leader else None,
        )

    def _finished(self, is_ready: IsReady) -> PrefillPlan:
        buckets, stats = self._roster.buckets, self._roster.stats
        num_tokens = sum(len(row.token_ids) for row in self._rows)
        sizes = [t for t in buckets.prefill_tokens if buckets.prefill_rows(t) >= len(self._rows)]
        size = buckets.size("prefill", max(num_tokens, sizes[0]), is_ready)
        stats.num_prefills += 1
        stats.num_prefill_tokens += num_tokens
        stats.num_prefill_padding += size - num_tokens
        return PrefillPlan(
            num_tokens=size,
            rows=self._rows,
            new_rows=self._new_rows,
            page_writes=self._page_writes,
        )
