"""Continuous batching: decides every step from host counters alone, one step ahead of the device.

The device runs steps in the order they are dispatched. So pages and slots of a finished sequence
can be given away at once: whatever is still in flight reads and writes them before the new owner.
For the same reason a page may be shared as soon as the step that fills it was planned.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxengine.errors import NaNLogitsError, SamplerError, StepError
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.decode import plan_decode
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.plan import DecodePlan, PrefillPlan, StepPlan, StepResult
from jaxengine.scheduler.policy import Policy
from jaxengine.scheduler.prefill import STREAM_CHUNK_TOKENS, PrefillDraft
from jaxengine.scheduler.roster import Roster, SchedulerStats
from jaxengine.scheduler.sequence import Sequence, Status
from jaxengine.scheduler.urgency import make_room
from jaxengine.types import DRAW_ERRORS, HIDDEN, SequenceRequest, SequenceUpdate, StopReason

MAX_PREFILLS_IN_A_ROW = 32
"""After so many a window runs, so that prompts that never cease starve nobody who decodes."""


class Scheduler:
    """Plans steps, and takes their results in."""

    def __init__(
        self,
        buckets: Buckets,
        pool: PagePool,
        is_ready: Callable[[tuple[str, int, int]], bool] = lambda key: True,
        *,
        policy: Policy = Policy(),  # noqa: B008
        has_prefix_cache: bool = True,
    ) -> None:
        """Starts with nobody.

        Args:
          buckets: Shapes a plan may have.
          pool: Pages.
          is_ready: Says of `(kind, size, pages)` whether its program is compiled.
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
        if isinstance(plan, DecodePlan):
            drawn = result.token_ids[:, : plan.num_steps] != -1
            self.stats.num_masked_row_steps += int(drawn.size - drawn.sum())
        updates = []
        for i, row in enumerate(plan.rows):
            sequence = self._sequences.get(row.seq_id)
            if sequence is None:
                continue
            sequence.num_in_flight -= 1
            if row.seq_id == sequence.seq_id:
                prompt_leaves = _prompt_leaves(plan, result, i, sequence)
                leaves = {name: leaf[i] for name, leaf in result.leaves.items()}
                num_steps = plan.num_steps if isinstance(plan, DecodePlan) else 0
                update = self._take(sequence, result.token_ids[i], leaves, prompt_leaves, num_steps)
                updates += [update] if update is not None else []
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
        """Prefill first, but never twice in a row while someone reads a running stream."""
        return self._num_prefills_in_a_row < (1 if self._is_read() else MAX_PREFILLS_IN_A_ROW)

    def _plan_prefill(self) -> PrefillPlan | None:
        most = STREAM_CHUNK_TOKENS if self._is_read() else self._buckets.prefill_tokens[-1]
        return PrefillDraft(self._roster, most).plan(self._is_ready)

    def _take(
        self,
        sequence: Sequence,
        token_ids: np.ndarray,
        leaves: Mapping[str, np.ndarray],
        prompt_leaves: Mapping[str, np.ndarray],
        num_steps: int,
    ) -> SequenceUpdate | None:
        request = sequence.request
        drawn = _read(request, len(sequence.output_ids), token_ids)
        new = drawn.token_ids if request.max_new_tokens else []
        finish = sequence.ending or drawn.finish
        # A window feeds a token more than it draws where it went on after the last one.
        is_last_fed = finish is not None and len(drawn.token_ids) < num_steps
        kept = {
            name: leaf[: len(drawn.token_ids) + (name == HIDDEN and is_last_fed)]
            for name, leaf in leaves.items()
        }
        sequence.output_ids += new
        self.stats.num_generated_tokens += len(new)
        if request.feeds_last and not is_last_fed:
            sequence.ending, finish = finish, None
        if finish or drawn.error:
            self.finish(sequence.seq_id)
            return sequence.last_update(new, kept, prompt_leaves, finish, drawn.error)
        if not new and not prompt_leaves:
            return None
        return SequenceUpdate(sequence.seq_id, new, kept, prompt_leaves)

    def _fail(self, sequence: Sequence, error: Exception) -> SequenceUpdate:
        self.finish(sequence.seq_id)
        return sequence.last_update(error=error)


class _Drawn(NamedTuple):
    """What a row drew, up to its end, and how it ended."""

    token_ids: list[int]
    finish: StopReason | None = None
    error: Exception | None = None


def _read(request: SequenceRequest, num_before: int, token_ids: np.ndarray) -> _Drawn:
    """A row's tokens up to the first that ends it; no Python for each of them."""
    new = token_ids[: max(1, request.max_new_tokens - num_before)].tolist()
    code = -1
    if min(new, default=0) < 0:
        end = next(i for i, token in enumerate(new) if token < 0)
        new, code = new[:end], new[end]
    stops = set() if request.ignore_eos else set(request.stop_token_ids)
    if not stops.isdisjoint(new):
        end = next(i for i, token in enumerate(new) if token in stops)
        new, code = new[: end + 1], -1
    if code != -1:
        return _Drawn(new, error=_draw_error(code, request.rid, num_before + len(new)))
    if new and num_before + len(new) >= request.max_new_tokens:
        return _Drawn(new, finish=StopReason("length", length=request.max_new_tokens))
    if new and new[-1] in stops:
        return _Drawn(new, finish=StopReason("stop", matched=new[-1]))
    return _Drawn(new)


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
