"""Drives an EngineCore over the fake runner, and checks after every step all that must hold."""

from collections.abc import Callable, Mapping

from jaxengine.core import EngineCore
from jaxengine.errors import NaNLogitsError, StepError
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.scheduler import Scheduler
from jaxengine.types import SequenceRequest, SequenceUpdate
from tests.fake_runner import FakeRunner, Fault, InjectedFault, logprob_of, oracle


def make_buckets(
    *,
    num_slots: int = 8,
    prefill_tokens: tuple[int, ...] = (16, 64),
    pages_per_sequence: int = 128,
    page_size: int = 4,
    max_window_steps: int = 32,
) -> Buckets:
    sizes = (1, 2, 4, 8, 16)
    return Buckets(
        decode_rows=(*(b for b in sizes if b < num_slots), num_slots),
        prefill_tokens=prefill_tokens,
        num_pages=tuple(sorted({-(-pages_per_sequence // 4), pages_per_sequence})),
        num_slots=num_slots,
        page_size=page_size,
        max_window_steps=max_window_steps,
    )


class Driver:
    """A core on a fake device, and what came of every request."""

    def __init__(
        self,
        buckets: Buckets,
        num_pages: int = 1000,
        *,
        faults: Mapping[int, Fault] | None = None,
        is_eager: bool = False,
        is_ready: Callable[[tuple[str, int, int]], bool] = lambda key: True,
    ) -> None:
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(buckets, self.pool, is_ready)
        self.runner = FakeRunner(buckets, num_pages, faults, is_eager)
        self.core = EngineCore(self.scheduler, self.runner)
        self.requests: dict[int, SequenceRequest] = {}
        self.tokens: dict[int, list[int]] = {}
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
            self.tokens[request.seq_id] = []
            self.core.add(request)

    def abort(self, seq_id: int) -> None:
        is_living = seq_id in self.living
        assert self.core.finish(seq_id) == is_living
        if is_living:
            self.aborted.add(seq_id)
        self.check()

    def step(self) -> list[SequenceUpdate]:
        self.num_steps += 1
        living, num_failed = self.living, len(self.runner.failed)
        before = (len(self.runner.plans), self.runner.num_reads, num_failed)
        updates = self.core.step()
        after = (len(self.runner.plans), self.runner.num_reads, len(self.runner.failed))
        assert after != before or not self.core.has_work, "deadlock: nothing was started or read"
        assert len({update.seq_id for update in updates}) == len(updates)
        for update in updates:
            self._receive(update)
        self.check()
        failed = {i for plan in self.runner.failed[num_failed:] for i in plan.seq_ids}
        got = {update.seq_id for update in updates if isinstance(update.error, StepError)}
        assert got == failed & living, "other sequences failed than those of the failed step"
        return updates

    def run(self, max_steps: int = 10_000) -> None:
        """Steps until nothing is left to do; every request must have ended then."""
        for _ in range(max_steps):
            if not self.core.has_work:
                break
            self.step()
        assert not self.core.has_work, f"no end after {max_steps} steps"
        assert not self.living
        assert self.pool.num_free == self.pool.capacity
        assert self.scheduler.stats.num_finished == len(self.requests)

    def check(self) -> None:
        """Asserts what must hold between any two steps."""
        self.scheduler.check_integrity()
        order = [s.seq_id for s in (*self.scheduler._running, *self.scheduler._waiting)]
        assert order == sorted(order), "a later request stands before an earlier one"
        assert set(order) == self.living

    def _receive(self, update: SequenceUpdate) -> None:
        seq_id = update.seq_id
        assert seq_id in self.living, f"sequence {seq_id} spoke after its end"
        request, tokens = self.requests[seq_id], self.tokens[seq_id]
        tokens += update.token_ids
        wanted = oracle(request)
        assert tokens == wanted.token_ids[: len(tokens)]
        assert list(update.logprobs) == [
            logprob_of(t) for t in update.token_ids if request.wants_logprobs
        ]
        if update.finish is None and update.error is None:
            assert update.token_ids, "an update brings nothing"
            return
        self.endings[seq_id] = update
        if isinstance(update.error, StepError) and isinstance(
            update.error.__cause__, InjectedFault
        ):
            assert "InjectedFault: the device caught fire" in str(update.error)
            return
        if isinstance(update.error, NaNLogitsError):
            assert request.rid in str(update.error)
        elif update.error is not None:
            raise update.error
        assert (tokens, update.finish) == wanted
