"""Drives an EngineCore over the fake runner, and checks after every step all that must hold."""

from collections.abc import Collection, Mapping

from jaxengine.core import EngineCore
from jaxengine.errors import NaNLogitsError, StepError
from jaxengine.scheduler.buckets import Buckets, IsReady
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.policy import Policy
from jaxengine.scheduler.prefix_cache import Key
from jaxengine.scheduler.scheduler import Scheduler
from jaxengine.types import SequenceRequest, SequenceUpdate
from tests.fake_runner import FakeRunner, Fault, logprob_of, oracle


def make_buckets(
    *,
    num_slots: int = 8,
    prefill_tokens: tuple[int, ...] = (16, 64),
    page_size: int = 4,
    max_window_steps: int = 32,
) -> Buckets:
    sizes = (1, 2, 4, 8, 16)
    return Buckets(
        decode_rows=(*(b for b in sizes if b < num_slots), num_slots),
        prefill_tokens=prefill_tokens,
        num_slots=num_slots,
        page_size=page_size,
        max_window_steps=max_window_steps,
    )


FCFS = Policy()


class Driver:
    """A core on a fake device, and what came of every request."""

    def __init__(
        self,
        buckets: Buckets,
        num_pages: int = 1000,
        *,
        faults: Mapping[int, Fault] | None = None,
        is_eager: bool = False,
        failing_resets: Collection[int] = (),
        is_ready: IsReady = lambda kind, size: True,
        policy: Policy = FCFS,
        has_prefix_cache: bool = True,
    ) -> None:
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(
            buckets, self.pool, is_ready, policy=policy, has_prefix_cache=has_prefix_cache
        )
        self.cache = self.scheduler._roster.cache
        self.runner = FakeRunner(buckets, num_pages, faults, is_eager, failing_resets)
        self.core = EngineCore(self.scheduler, self.runner, page_bytes=500_000)
        self.requests: dict[int, SequenceRequest] = {}
        self.leader_ids: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.prompt_logprobs: dict[int, list[float]] = {}
        self.endings: dict[int, SequenceUpdate] = {}
        self.aborted: set[int] = set()
        self.num_steps = 0

    @property
    def living(self) -> set[int]:
        """Sequences that have not ended."""
        return self.requests.keys() - self.endings.keys() - self.aborted

    @property
    def finish_order(self) -> list[int]:
        """Sequences in the order in which they ended."""
        return list(self.endings)

    def add(self, *requests: SequenceRequest) -> None:
        for request in requests:
            self.requests[request.seq_id] = request
            for member in (request, *request.companions):
                self.leader_ids[member.seq_id] = request.seq_id
            self.tokens[request.seq_id] = []
            self.prompt_logprobs[request.seq_id] = []
            self.core.add(request)

    def abort(self, seq_id: int) -> None:
        is_living = seq_id in self.living
        assert self.core.finish(seq_id) == is_living
        if is_living:
            self.aborted.add(seq_id)
        self.check()

    def pause(self, *, keeps_pages: bool) -> None:
        """Pauses, as the core does; what fails meanwhile is told as in a step."""
        self.receive(self.core.pause(keeps_pages=keeps_pages))

    def step(self) -> list[SequenceUpdate]:
        self.num_steps += 1
        living, num_failed = self.living, len(self.runner.failed)
        before = (len(self.runner.plans), self.runner.num_reads, num_failed)
        cached = self.cache._keys.copy()
        self.runner.written.clear()
        updates = self.core.step()
        self._check_writes(cached)
        after = (len(self.runner.plans), self.runner.num_reads, len(self.runner.failed))
        assert after != before or not self.core.has_work, "deadlock: nothing was started or read"
        has_failed = len(self.runner.failed) > num_failed
        assert has_failed or len({update.seq_id for update in updates}) == len(updates)
        self.receive(updates)
        failed = {
            self.leader_ids[i] for plan in self.runner.failed[num_failed:] for i in plan.seq_ids
        }
        got = {update.seq_id for update in updates if isinstance(update.error, StepError)}
        # Of the others only those end whose sampler's state was lost with the device's; and all
        # where that cannot be made anew.
        others = {i for i in got - failed if not self.requests[i].is_stateful}
        others = others if self.core._has_device_state else set()
        assert failed & living <= self.endings.keys() and not others, (
            "not those of the failed step have failed"
        )
        return updates

    def receive(self, updates: list[SequenceUpdate]) -> None:
        """Takes updates in, and checks what must hold then."""
        for update in updates:
            self._receive(update)
        self.check()

    def run(self, max_steps: int = 10_000) -> None:
        """Steps until nothing is left to do; every request must have ended then."""
        for _ in range(max_steps):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work, f"no end after {max_steps} steps"
        assert not self.living
        assert self.cache.num_available == self.pool.capacity
        assert self.scheduler.stats.num_finished == len(self.requests)

    def check(self) -> None:
        """Asserts what must hold between any two steps."""
        self.scheduler.check_integrity()
        there = [*self.scheduler._roster.running, *self.scheduler._roster.waiting]
        assert {sequence.seq_id for sequence in there} == self.living

    def _check_writes(self, cached: Mapping[int, Key]) -> None:
        """Asserts that the step wrote into no page that was cached before and after it."""
        # A page that went and came back for the same text has another key, though an equal one.
        kept = {page for page, key in cached.items() if self.cache._keys.get(page) is key}
        assert not kept & self.runner.written, "a cached page is written"

    def _receive(self, update: SequenceUpdate) -> None:
        seq_id = update.seq_id
        assert seq_id in self.living, f"sequence {seq_id} spoke after its end"
        request, tokens = self.requests[seq_id], self.tokens[seq_id]
        tokens += update.token_ids
        wanted = oracle(request)
        assert tokens == wanted.token_ids[: len(tokens)]
        if request.max_new_tokens > 0:
            logprobs = [logprob_of(t) for t in update.token_ids] if request.wants_logprobs else []
            assert list(update.leaves.get("logprob", ())) == logprobs
        self.prompt_logprobs[seq_id] += list(update.prompt_leaves.get("logprob", ()))
        start = len(request.prompt_ids) if request.logprob_start is None else request.logprob_start
        scores = [logprob_of(t) for t in request.prompt_ids[max(1, start) :]]
        got = self.prompt_logprobs[seq_id]
        assert got == scores[: len(got)]
        if update.finish is None and update.error is None:
            assert update.token_ids or update.prompt_leaves, "an update brings nothing"
            return
        self.endings[seq_id] = update
        if isinstance(update.error, StepError):
            message = str(update.error)
            if self.runner.num_resets > 2 and "could not be made anew" in message:
                return
            is_lost = request.is_stateful and "the state its sampler had" in message
            assert is_lost or "InjectedFault: the device caught fire" in message
            return
        if isinstance(update.error, NaNLogitsError):
            assert request.rid in str(update.error)
        elif update.error is not None:
            raise update.error
        if update.finish and update.finish.type == "abort":
            return
        assert got == scores
        assert (tokens, update.finish) == wanted
