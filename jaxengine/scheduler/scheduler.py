"""Continuous batching: decides every step from host counters alone, one step ahead of the device.

The device runs steps in the order they are dispatched. So pages and slots of a finished sequence
can be given away at once: whatever is still in flight reads and writes them before the new owner.
For the same reason a page may be shared as soon as the step that fills it was planned.
"""

from collections.abc import Mapping

import numpy as np

from jaxengine.errors import NaNLogitsError, SamplerError, StepError
from jaxengine.scheduler.buckets import Buckets, IsReady
from jaxengine.scheduler.decode import plan_decode
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.plan import DecodePlan, PrefillPlan, StepPlan, StepResult
from jaxengine.scheduler.policy import Policy
from jaxengine.scheduler.prefill import STREAM_CHUNK_TOKENS, PrefillDraft
from jaxengine.scheduler.roster import Roster, SchedulerStats
from jaxengine.scheduler.sequence import Sequence, Status
from jaxengine.scheduler.urgency import make_room
from jaxengine.types import (
    CAPTURES,
    DRAW_ERRORS,
    HIDDEN,
    SequenceRequest,
    SequenceUpdate,
    StopReason,
)

MAX_PREFILLS_IN_A_ROW = 32
"""After so many a window runs, so that prompts that never cease starve nobody who decodes."""


class Scheduler:
    """Plans steps, and takes their results in."""

    def __init__(
        self,
        buckets: Buckets,
        pool: PagePool,
        is_ready: IsReady = lambda kind, size: True,
        *,
        policy: Policy = Policy(),  # noqa: B008
        has_prefix_cache: bool = True,
    ) -> None:
        """Starts with nobody.

        Args:
          buckets: Shapes a plan may have.
          pool: Pages.
          is_ready: Which programs are compiled.
          policy: Who is next.
          has_prefix_cache: Texts that begin alike share pages.
        """
        self._buckets = buckets
        self._pool = pool
        self._is_ready = is_ready
        self._roster = Roster(buckets, pool, policy, has_prefix_cache=has_prefix_cache)
        # By the ids of all members.
        self._sequences: dict[int, Sequence] = {}
        self._num_prefills_in_a_row = 0

    @property
    def stats(self) -> SchedulerStats:
        """Counts since the start."""
        return self._roster.stats

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet."""
        return len(self._roster.waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages."""
        return len(self._roster.running)

    @property
    def num_free_pages(self) -> int:
        """Pages that can be had: those nobody holds, cached ones included."""
        return self._roster.cache.num_available

    @property
    def num_cached_pages(self) -> int:
        """Pages the prefix cache has, those in use included."""
        return self._roster.cache.num_cached

    @property
    def num_free_slots(self) -> int:
        """Sequences that could start now if there were pages for them."""
        return self._roster.num_free_slots

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self._pool.capacity

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._sequences)

    def add(self, request: SequenceRequest) -> None:
        """Queues a sequence."""
        sequence = Sequence(request=request)
        for member in sequence.members:
            self._sequences[member.request.seq_id] = sequence
        self._roster.add(sequence)

    def finish(self, seq_id: int) -> Sequence | None:
        """Ends a sequence now: aborted, stopped by its text, or failed. None if it has ended."""
        sequence = self._sequences.get(seq_id)
        if sequence is not None:
            for member in sequence.members:
                del self._sequences[member.request.seq_id]
            self._roster.retire(sequence)
        return sequence

    def preempt_all(self) -> None:
        """Lets everyone wait again; nothing may be in flight."""
        for sequence in self._roster.running[::-1]:
            self._roster.preempt(sequence)

    def flush_cache(self) -> None:
        """Forgets all prefixes; those who run go on with the pages they have."""
        self._roster.cache.flush()

    @property
    def is_bound_to_device(self) -> bool:
        """Someone's sampler has a state on the device that cannot be had again."""
        return any(sequence.is_bound_to_slots for sequence in self._sequences.values())

    def forget_device(self) -> None:
        """All that was on the device is given up, while nothing is in flight: everyone is computed
        anew, and nobody may be bound to it."""
        self._roster.forget_device()

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before a commit."""
        if not make_room(self._roster):
            return None
        plan = self._plan_prefill() if self._prefill_is_due() else None
        plan = plan or plan_decode(self._roster, self._is_ready) or self._plan_prefill()
        if plan is not None:
            is_prefill = isinstance(plan, PrefillPlan)
            self._num_prefills_in_a_row = self._num_prefills_in_a_row + 1 if is_prefill else 0
            for seq_id in plan.seq_ids:
                self._sequences[seq_id].num_in_flight += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Takes a step's tokens in; rows of sequences that ended meanwhile are dropped."""
        num_steps = plan.num_steps if isinstance(plan, DecodePlan) else 0
        token_ids = result.token_ids[:, : num_steps or None]
        # A row's tokens stand before the places where it drew none.
        num_drawn = (token_ids != -1).sum(axis=1).tolist()
        if isinstance(plan, DecodePlan):
            self.stats.num_masked_row_steps += token_ids.size - sum(num_drawn)
        rows = zip(plan.rows, token_ids.tolist(), num_drawn, strict=True)
        always = [n for n in result.leaves if n == HIDDEN or n.startswith(CAPTURES)]
        updates = []
        for i, (row, drawn, count) in enumerate(rows):
            sequence = self._sequences.get(row.seq_id)
            if sequence is None:
                continue
            sequence.num_in_flight -= 1
            if row.seq_id == sequence.seq_id:
                del drawn[count:]
                names = result.leaves if sequence.request.wants_logprobs else always
                leaves = {name: result.leaves[name][i] for name in names}
                prompt_leaves = _prompt_leaves(plan, result, i, sequence)
                update = self._take(
                    sequence, drawn, leaves, prompt_leaves, num_steps, result.weights_id
                )
                if update is not None:
                    updates.append(update)
        return updates

    def recover(self, plans: list[StepPlan], error: Exception) -> list[SequenceUpdate]:
        """After the device state was lost: the sequences of the failed steps fail with `error`.

        All others are computed anew, which gives the same tokens, for noise depends on seed and
        position only; but for those whose sampler kept a state of the tokens it drew.
        """
        failed = {self._sequences[i] for p in plans for i in p.seq_ids if i in self._sequences}
        updates = [self._fail(sequence, error) for sequence in _by_arrival(failed)]
        lost = {s for s in self._sequences.values() if s.request.is_stateful and s.output_ids}
        for sequence in _by_arrival(lost):
            updates.append(self._fail(sequence, _state_lost(sequence, error)))
        self._roster.forget_device()
        return updates

    def fail_all(self, error: Exception) -> list[SequenceUpdate]:
        """Ends everyone with an error."""
        return [self._fail(s, error) for s in _by_arrival(set(self._sequences.values()))]

    def check_integrity(self) -> None:
        """Asserts that pages and slots are each held once, and by living sequences."""
        self._roster.check_integrity()
        living = set(self._sequences.values())
        there = [*self._roster.running, *self._roster.waiting]
        assert len(there) == len(living) and set(there) == living, "a sequence is lost"

    def _is_read(self) -> bool:
        """Someone reads a stream of tokens as they come."""
        return any(
            s.request.is_streaming and s.status is Status.RUNNING for s in self._roster.running
        )

    def _prefill_is_due(self) -> bool:
        """Prefill first; a second one in a row only if it is large, or if no more decode than would
        begin, and nobody reads a stream."""
        if self._num_prefills_in_a_row == 0:
            return True
        if self._is_read() or self._num_prefills_in_a_row >= MAX_PREFILLS_IN_A_ROW:
            return False
        largest = self._buckets.prefill_tokens[-1]
        num_tokens, num_rows = self._roster.to_prefill(largest)
        return num_tokens >= largest // 4 or num_rows >= len(self._roster.running)

    def _plan_prefill(self) -> PrefillPlan | None:
        most = STREAM_CHUNK_TOKENS if self._is_read() else self._buckets.prefill_tokens[-1]
        most = self._buckets.full_prefill(*self._roster.to_prefill(most))
        return PrefillDraft(self._roster, most).plan(self._is_ready)

    def _take(
        self,
        sequence: Sequence,
        drawn: list[int],
        leaves: Mapping[str, np.ndarray],
        prompt_leaves: Mapping[str, np.ndarray],
        num_steps: int,
        weights_id: int,
    ) -> SequenceUpdate | None:
        request = sequence.request
        finish, error = _ending(request, len(sequence.output_ids), drawn)
        if error is not None:
            drawn = drawn[:-1]
        finish = sequence.ending or finish
        # A window feeds a token more than it draws where it went on after the last one.
        is_last_fed = finish is not None and len(drawn) < num_steps
        kept = {
            name: leaf[: len(drawn) + (name == HIDDEN and is_last_fed)]
            for name, leaf in leaves.items()
        }
        new = drawn if request.max_new_tokens else []
        sequence.output_ids.fromlist(new)
        self.stats.num_generated_tokens += len(new)
        if request.feeds_last and not is_last_fed:
            sequence.ending, finish = finish, None
        if finish or error:
            self.finish(sequence.seq_id)
            return sequence.last_update(new, kept, prompt_leaves, finish, error, weights_id)
        if not new and not prompt_leaves:
            return None
        return SequenceUpdate(sequence.seq_id, new, kept, prompt_leaves, weights_id=weights_id)

    def _fail(self, sequence: Sequence, error: Exception) -> SequenceUpdate:
        self.finish(sequence.seq_id)
        return sequence.last_update(error=error)


def _ending(
    request: SequenceRequest, num_before: int, drawn: list[int]
) -> tuple[StopReason | None, Exception | None]:
    """How a row ended, if it did: then with the last token drawn, for the device draws no more."""
    if not drawn:
        return None, None
    last, count = drawn[-1], num_before + len(drawn)
    if last < 0:
        return None, _draw_error(last, request.rid, count - 1)
    if count >= request.max_new_tokens:
        return StopReason("length", length=request.max_new_tokens), None
    if last in request.stop_token_ids and not request.ignore_eos:
        return StopReason("stop", matched=last), None
    return None, None


def _prompt_leaves(
    plan: StepPlan, result: StepResult, row: int, sequence: Sequence
) -> dict[str, np.ndarray]:
    """What a chunk brought of prompt tokens: logprobs where its targets are, hidden states."""
    if not isinstance(plan, PrefillPlan):
        return {}
    leaves, (targets, states) = {}, (plan.rows[row].targets, plan.rows[row].states)
    if targets is not None:
        is_wanted = targets != -1
        sequence.first_unscored += int(is_wanted.sum())
        leaves = {n: x[row][is_wanted] for n, x in result.prompt_leaves.items() if n != HIDDEN}
    if states is not None:
        leaves[HIDDEN] = result.prompt_leaves[HIDDEN][row][states]
        sequence.first_stateless += len(leaves[HIDDEN])
    return leaves


def _by_arrival(sequences: set[Sequence]) -> list[Sequence]:
    return sorted(sequences, key=lambda s: s.arrival)


def _draw_error(code: int, rid: str, num_before: int) -> Exception:
    kind = NaNLogitsError if code == -2 else SamplerError
    return kind(f"Request {rid}, after {num_before} tokens: {DRAW_ERRORS[code]}.")


def _state_lost(sequence: Sequence, cause: Exception) -> StepError:
    error = StepError(
        f"Request {sequence.request.rid}, after {len(sequence.output_ids)} tokens: a device step "
        "of others failed, and the state its sampler had of the tokens drawn so far was lost with "
        "it. Submit it again."
    )
    error.__cause__ = cause
    return error
