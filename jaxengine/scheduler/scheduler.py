"""Continuous batching: decides every step from host counters alone, one step ahead of the device.

The device runs steps in the order they are dispatched. So pages and slots of a finished sequence
can be given away at once: whatever is still in flight reads and writes them before the new owner.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxengine.errors import NaNLogitsError
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.plan import (
    DecodePlan,
    DecodeRow,
    NewRow,
    PageWrite,
    PrefillPlan,
    PrefillRow,
    StepPlan,
    StepResult,
)
from jaxengine.scheduler.sequence import Sequence, Status
from jaxengine.types import SequenceRequest, SequenceUpdate, StopReason

STREAM_WINDOW_STEPS = 8
"""Window length while someone reads tokens as they come, or waits for a slot."""

MAX_PREFILLS_IN_A_ROW = 16
"""After so many a window runs, so that prompts that never cease starve nobody who decodes."""


@dataclass
class SchedulerStats:
    """Counts since the start; `engine.stats()` shows them."""

    num_windows: int = 0
    num_window_steps: int = 0
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    num_prefill_padding: int = 0
    num_decode_rows: int = 0
    num_decode_padding: int = 0
    num_masked_rows: int = 0
    num_generated_tokens: int = 0
    num_retractions: int = 0
    num_finished: int = 0


class Scheduler:
    """Owns every sequence, the slots, and the page pool."""

    def __init__(
        self,
        buckets: Buckets,
        pool: PagePool,
        is_ready: Callable[[tuple[str, int, int]], bool] = lambda key: True,
    ) -> None:
        self._buckets = buckets
        self._pool = pool
        self._is_ready = is_ready
        self._free_slots = list(range(buckets.num_slots))[::-1]
        self._sequences: dict[int, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._num_prefills_in_a_row = 0
        self.stats = SchedulerStats()

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._running)

    @property
    def num_free_pages(self) -> int:
        """Pages of the pool nobody holds."""
        return self._pool.num_free

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._sequences)

    def add(self, request: SequenceRequest) -> None:
        """Queues a sequence, first come first served."""
        sequence = Sequence(request=request)
        self._sequences[request.seq_id] = sequence
        self._waiting.append(sequence)

    def finish(self, seq_id: int) -> Sequence | None:
        """Ends a sequence now: aborted, stopped by its text, or failed. None if it has ended."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is not None:
            self._retire(sequence)
        return sequence

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before a commit."""
        plan = self._plan_prefill() if self._prefill_is_due() else None
        plan = plan or self._plan_decode() or self._plan_prefill()
        if plan is not None:
            is_prefill = isinstance(plan, PrefillPlan)
            self._num_prefills_in_a_row = self._num_prefills_in_a_row + 1 if is_prefill else 0
            for seq_id in plan.seq_ids:
                self._sequences[seq_id].num_in_flight += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Takes a step's tokens in; rows of sequences that ended meanwhile are dropped."""
        updates = []
        for row, seq_id in enumerate(plan.seq_ids):
            sequence = self._sequences.get(seq_id)
            if sequence is None:
                self.stats.num_masked_rows += 1
                continue
            sequence.num_in_flight -= 1
            update = self._take(sequence, result.token_ids[row], result.logprobs[row])
            if update is not None:
                updates.append(update)
        return updates

    def recover(self, plan: StepPlan, error: Exception) -> list[SequenceUpdate]:
        """After a failed step: its sequences fail, all others are computed anew.

        Recomputing gives the same tokens, for noise depends on seed and position only.
        """
        updates = []
        for seq_id in plan.seq_ids:
            sequence = self.finish(seq_id)
            if sequence is not None:
                updates.append(self._final(sequence, [], [], error=error))
        for sequence in self._sequences.values():
            sequence.num_in_flight = 0
        for sequence in reversed(self._running[:]):
            self._preempt(sequence)
        return updates

    def check_integrity(self) -> None:
        """Asserts that pages and slots are each held once, and by living sequences."""
        living = list(self._sequences.values())
        self._pool.check_integrity([s.pages for s in living])
        slots = [s.slot for s in living if s.slot is not None] + self._free_slots
        assert sorted(slots) == list(range(self._buckets.num_slots)), "slots do not add up"
        assert len(self._running) + len(self._waiting) == len(living), "a sequence is lost"

    # -- prefill

    def _prefill_is_due(self) -> bool:
        """Prefill first, but never twice in a row while someone reads a running stream."""
        is_read = any(s.request.is_streaming and s.status is Status.RUNNING for s in self._running)
        return self._num_prefills_in_a_row < (1 if is_read else MAX_PREFILLS_IN_A_ROW)

    def _plan_prefill(self) -> PrefillPlan | None:
        most_tokens = self._buckets.prefill_tokens[-1]
        budget, rows = most_tokens, []
        new_rows: list[NewRow] = []
        writes: list[PageWrite] = []
        max_rows = self._buckets.prefill_rows(most_tokens)
        while budget and len(rows) < max_rows:
            sequence = self._next_to_prefill(rows)
            if sequence is None:
                break
            if sequence.status is Status.WAITING:
                self._admit(sequence, new_rows, writes)
            count = min(budget, sequence.prefill_len - sequence.num_prefilled)
            rows.append(self._chunk(sequence, count))
            budget -= count
        if not rows:
            return None
        num_tokens = most_tokens - budget
        longest = max(row.start + len(row.token_ids) for row in rows)
        bucket = self._bucket("prefill", self._fitting_tokens(num_tokens, len(rows)), longest)
        self.stats.num_prefills += 1
        self.stats.num_prefill_tokens += num_tokens
        self.stats.num_prefill_padding += bucket[0] - num_tokens
        return PrefillPlan(
            num_tokens=bucket[0],
            num_pages=bucket[1],
            rows=rows,
            new_rows=new_rows,
            page_writes=writes,
        )

    def _fitting_tokens(self, num_tokens: int, num_rows: int) -> int:
        """Tokens of the smallest bucket that also has room for this many rows."""
        sizes = self._buckets.prefill_tokens
        fits = [t for t in sizes if self._buckets.prefill_rows(t) >= num_rows]
        return max(num_tokens, fits[0])

    def _next_to_prefill(self, rows: list[PrefillRow]) -> Sequence | None:
        """A sequence with prompt left to compute, else the head of the queue if it can start."""
        planned = {row.seq_id for row in rows}
        for sequence in self._running:
            if sequence.status is Status.PREFILLING and sequence.seq_id not in planned:
                return sequence
        if not self._waiting:
            return None
        head = self._waiting[0]
        has_slot = head.slot is not None or self._free_slots
        # A preempted sequence must first learn the tokens still in flight.
        if head.num_in_flight or not has_slot:
            return None
        return head if self._pages_for_start(head) <= self._pool.num_free else None

    def _pages_for_start(self, sequence: Sequence) -> int:
        """Pages of the whole prompt and its first token, and of two windows for those that run:
        with less, they would soon take the newcomer's pages away again."""
        ahead = 2 * self._buckets.max_window_steps
        reserved = sum(self._num_pages(min(ahead, other.num_left)) for other in self._running)
        return self._num_pages(sequence.prefill_len + 1) + reserved

    def _admit(self, sequence: Sequence, new_rows: list[NewRow], writes: list[PageWrite]) -> None:
        self._waiting.popleft()
        self._running.append(sequence)
        sequence.status = Status.PREFILLING
        sequence.num_prefilled = 0
        sequence.num_scheduled = len(sequence.output_ids)
        if sequence.slot is None:
            sequence.slot = self._free_slots.pop()
        new_rows.append(NewRow(sequence.slot, sequence.request, tuple(sequence.output_ids)))
        self._grow(sequence, sequence.prefill_len, writes)

    def _chunk(self, sequence: Sequence, count: int) -> PrefillRow:
        start = sequence.num_prefilled
        sequence.num_prefilled += count
        is_last = sequence.num_prefilled == sequence.prefill_len
        draws = is_last and not sequence.output_ids
        if is_last:
            sequence.status = Status.RUNNING
            sequence.num_scheduled += draws
        tokens = sequence.prefill_tokens(start, count)
        return PrefillRow(sequence.seq_id, sequence.held_slot, tokens, start, draws)

    # -- decode

    def _plan_decode(self) -> DecodePlan | None:
        rows = self._decodable()
        while rows:
            steps = self._window_steps(rows)
            while steps > 1 and self._pages_short(rows, steps) > 0:
                steps //= 2
            if self._pages_short(rows, steps) <= 0:
                return self._decode_plan(rows, steps)
            self._preempt(self._running[-1])
            rows = self._decodable()
        return None

    def _decodable(self) -> list[Sequence]:
        able = [s for s in self._running if s.status is Status.RUNNING and s.num_left > 0]
        return able[: self._buckets.decode_rows[-1]]

    def _window_steps(self, rows: list[Sequence]) -> int:
        """Long when nobody waits; short when someone reads along or a slot is wanted soon."""
        longest = max(row.num_left for row in rows)
        steps = min(self._buckets.max_window_steps, longest)
        if any(row.request.is_streaming for row in rows):
            # What is left after whole windows joins the last one: no window is shorter than these.
            return steps if longest < 2 * STREAM_WINDOW_STEPS else min(steps, STREAM_WINDOW_STEPS)
        if self._waiting:
            first_to_end = max(STREAM_WINDOW_STEPS, min(row.num_left for row in rows))
            return min(steps, first_to_end)
        return steps

    def _pages_short(self, rows: list[Sequence], steps: int) -> int:
        needed = sum(max(0, self._pages_after(row, steps) - len(row.pages)) for row in rows)
        return needed - self._pool.num_free

    def _pages_after(self, sequence: Sequence, steps: int) -> int:
        steps = min(steps, sequence.num_left)
        # The last token drawn is never written: its K/V would only serve the next one.
        tokens = len(sequence.request.prompt_ids) + sequence.num_scheduled + steps - 1
        return self._num_pages(tokens)

    def _decode_plan(self, rows: list[Sequence], steps: int) -> DecodePlan:
        writes: list[PageWrite] = []
        for row in rows:
            planned = min(steps, row.num_left)
            row_tokens = len(row.request.prompt_ids) + row.num_scheduled + planned - 1
            self._grow(row, row_tokens, writes)
            row.num_scheduled += planned
        longest = max(len(row.pages) for row in rows) * self._buckets.page_size
        num_rows, num_pages = self._bucket("decode", len(rows), longest)
        self.stats.num_windows += 1
        self.stats.num_window_steps += steps
        self.stats.num_decode_rows += len(rows)
        self.stats.num_decode_padding += num_rows - len(rows)
        return DecodePlan(
            num_rows=num_rows,
            num_pages=num_pages,
            num_steps=steps,
            rows=[DecodeRow(row.seq_id, row.held_slot) for row in rows],
            page_writes=writes,
        )

    def _bucket(self, kind: str, needed: int, num_tokens: int) -> tuple[int, int]:
        """The smallest compiled shape that fits; one that is ready now is preferred."""
        sizes = self._buckets.decode_rows if kind == "decode" else self._buckets.prefill_tokens
        num_pages = self._num_pages(num_tokens)
        fits = [
            (size, pages)
            for size in sizes
            for pages in self._buckets.num_pages
            if size >= needed and pages >= num_pages
        ]
        ready = [shape for shape in fits if self._is_ready((kind, *shape))]
        return min(ready or fits)

    # -- pages, slots, ends

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._buckets.page_size)

    def _grow(self, sequence: Sequence, num_tokens: int, writes: list[PageWrite]) -> None:
        have = len(sequence.pages)
        new = self._pool.allocate(max(0, self._num_pages(num_tokens) - have))
        sequence.pages += new
        writes += [PageWrite(sequence.held_slot, have + i, page) for i, page in enumerate(new)]

    def _preempt(self, sequence: Sequence) -> None:
        """Takes the pages away; the sequence keeps its slot and is recomputed in its turn."""
        self._running.remove(sequence)
        self._pool.free(sequence.pages)
        sequence.pages = []
        sequence.status = Status.WAITING
        sequence.num_retractions += 1
        self.stats.num_retractions += 1
        self._waiting.appendleft(sequence)

    def _retire(self, sequence: Sequence) -> None:
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
        self._pool.free(sequence.pages)
        if sequence.slot is not None:
            self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.status = [], None, Status.FINISHED
        self.stats.num_finished += 1

    def _take(
        self, sequence: Sequence, token_ids: np.ndarray, logprobs: np.ndarray
    ) -> SequenceUpdate | None:
        request = sequence.request
        new: list[int] = []
        finish, error = None, None
        for token in (int(t) for t in token_ids):
            if token == -1:
                break
            if token < 0:
                error = NaNLogitsError(
                    f"Request {request.rid}: the model gave NaN logits after "
                    f"{len(sequence.output_ids) + len(new)} tokens; check its weights and dtype."
                )
                break
            if request.max_new_tokens > 0:  # a limit of 0 computes the prompt alone
                new.append(token)
            if len(sequence.output_ids) + len(new) >= request.max_new_tokens:
                finish = StopReason("length", length=request.max_new_tokens)
                break
            if token in request.stop_token_ids and not request.ignore_eos:
                finish = StopReason("stop", matched=token)
                break
        kept = [float(x) for x in logprobs[: len(new)]] if request.wants_logprobs else []
        sequence.output_ids += new
        sequence.logprobs += kept
        self.stats.num_generated_tokens += len(new)
        if finish is None and error is None:
            return SequenceUpdate(sequence.seq_id, new, kept) if new else None
        self.finish(sequence.seq_id)
        return self._final(sequence, new, kept, finish, error)

    @staticmethod
    def _final(
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[float],
        finish: StopReason | None = None,
        error: Exception | None = None,
    ) -> SequenceUpdate:
        return SequenceUpdate(
            sequence.seq_id,
            token_ids,
            logprobs,
            finish,
            error,
            num_retractions=sequence.num_retractions,
        )
