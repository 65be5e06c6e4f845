"""Random traces: every request ends exactly once, with the tokens it gets when it is alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import jaxtyping
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxengine.log import logger
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.plan import PrefillPlan
from jaxengine.scheduler.policy import Policy
from jaxengine.types import SequenceRequest
from tests.fake_runner import NAN_TOKEN, VOCAB_SIZE, Fault, make_request
from tests.scheduler.driver import Driver


@pytest.fixture(scope="module", autouse=True)
def _quick_and_quiet() -> Iterator[None]:
    """The unit tests check types; here that would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        patch.setattr(logger, "disabled", True)
        yield


def prompt(length: int, seed: int) -> list[int]:
    return [(i * i + i // 9 * (seed % 3)) % VOCAB_SIZE for i in range(length)]


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A request on its way through the engine.

    Attributes:
      wait: Steps after the one before it came.
      prompt_len: Tokens of the prompt.
      max_new_tokens: Its limit.
      abort_after: Steps after it came; None to let it end.
      nan_at: Output token that is NaN.
      stop_token_ids: Each is drawn about every 64 tokens.
      min_new_tokens: Its lower limit.
      seed: Of its tokens.
      is_streaming: Someone reads along.
      wants_logprobs: As it says.
      ignore_eos: As it says.
      companion_lens: Prompts of its companions.
      logprob_start: As it says.
      is_stateful: As it says.
      salt: Its namespace in the prefix cache.
      priority: As it says.
    """

    wait: int
    prompt_len: int
    max_new_tokens: int
    abort_after: int | None
    nan_at: int | None
    stop_token_ids: frozenset[int]
    min_new_tokens: int
    seed: int
    is_streaming: bool
    wants_logprobs: bool
    ignore_eos: bool
    companion_lens: tuple[int, ...]
    logprob_start: int | None
    is_stateful: bool
    salt: str | None
    priority: int

    @property
    def num_members(self) -> int:
        return 1 + len(self.companion_lens)

    def num_pages(self, page_size: int) -> int:
        lens = (self.prompt_len, *self.companion_lens)
        return sum(-(-(n + max(1, self.max_new_tokens)) // page_size) for n in lens)

    def request(self, seq_id: int) -> SequenceRequest:
        return make_request(
            seq_id,
            self.prompt_len,
            self.max_new_tokens,
            script={} if self.nan_at is None else {self.nan_at: NAN_TOKEN},
            stop_token_ids=tuple(self.stop_token_ids),
            seed=self.seed,
            min_new_tokens=min(self.min_new_tokens, self.max_new_tokens),
            ignore_eos=self.ignore_eos,
            is_streaming=self.is_streaming,
            wants_logprobs=self.wants_logprobs,
            is_stateful=self.is_stateful,
            logprob_start=self.logprob_start,
            cache_namespace=self.salt,
            priority=self.priority,
            # Few seeds and one formula for all: many prompts begin alike.
            prompt_ids=prompt(self.prompt_len, self.seed),
            companions=tuple(
                make_request(100 * (seq_id + 1) + i, n, 0, prompt_ids=prompt(n, self.seed + i))
                for i, n in enumerate(self.companion_lens)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Visits, and the engine they come to.

    Attributes:
      visits: In order.
      page_size: Tokens a page.
      spare_pages: Pages beyond what the largest request takes.
      num_slots: Sequences that may run at once.
      prefill_tokens: Buckets of packed tokens; small ones cut prompts into many chunks.
      max_window_steps: Longest window.
      ready: Bits that say which programs are compiled.
      is_eager: See `FakeRunner`.
      faults: See `FakeRunner`.
      has_prefix_cache: As it says.
      policy: As it says.
      pause: At which step there is one, and whether pages are kept; None for none.
    """

    visits: list[Visit]
    page_size: int
    spare_pages: int
    num_slots: int
    prefill_tokens: tuple[int, ...]
    max_window_steps: int
    ready: int
    is_eager: bool
    faults: dict[int, Fault]
    has_prefix_cache: bool
    policy: Policy
    pause: tuple[int, bool] | None

    def driver(self) -> Driver:
        num_slots = max(self.num_slots, *(v.num_members for v in self.visits))
        buckets = Buckets(
            decode_rows=tuple(sorted({1, -(-num_slots // 2), num_slots})),
            prefill_tokens=self.prefill_tokens,
            num_slots=num_slots,
            page_size=self.page_size,
            max_window_steps=self.max_window_steps,
        )
        return Driver(
            buckets,
            1 + max(v.num_pages(self.page_size) for v in self.visits) + self.spare_pages,
            faults=self.faults,
            is_eager=self.is_eager,
            is_ready=lambda _, size: bool(self.ready >> (size % 8) & 1),
            has_prefix_cache=self.has_prefix_cache,
            policy=self.policy,
        )


POLICIES = [
    Policy(),
    Policy(),
    Policy(schedule_policy="lpm"),
    Policy(schedule_policy="priority"),
    Policy(schedule_policy="priority", preemption_threshold=1),
    Policy(schedule_policy="priority", preemption_threshold=None, low_values_first=True),
]


def traces(faults: st.SearchStrategy[dict[int, Fault]]) -> st.SearchStrategy[Trace]:
    visits = st.builds(
        Visit,
        wait=st.sampled_from([0, 0, 0, 1, 2, 9]),
        prompt_len=st.integers(1, 6) | st.integers(1, 50),
        max_new_tokens=st.integers(0, 6) | st.integers(10, 60),
        abort_after=st.sampled_from([None] * 7 + [0, 2, 5, 9, 20]),
        nan_at=st.sampled_from([None] * 15 + [0, 5, 20]),
        stop_token_ids=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=2),
        min_new_tokens=st.integers(0, 9),
        seed=st.integers(0, 99),
        is_streaming=st.booleans(),
        wants_logprobs=st.booleans(),
        ignore_eos=st.booleans(),
        companion_lens=st.sampled_from([()] * 9 + [(1,), (7,), (30,), (3, 12)]),
        logprob_start=st.sampled_from([None] * 5 + [0, 1, 9, 40]),
        is_stateful=st.booleans(),
        salt=st.sampled_from([None] * 5 + ["salt"]),
        priority=st.sampled_from([0, 0, 0, 3, 11, -20]),
    )
    return st.builds(
        Trace,
        visits=st.lists(visits, min_size=1, max_size=5) | st.lists(visits, min_size=6, max_size=12),
        page_size=st.sampled_from([1, 2, 4, 16]),
        spare_pages=st.sampled_from([0, 0, 1, 3, 10, 200]),
        num_slots=st.sampled_from([1, 2, 3, 6, 9]),
        prefill_tokens=st.sampled_from([(1,), (3,), (8, 16), (4, 32, 128)]),
        max_window_steps=st.sampled_from([1, 2, 9, 32]),
        ready=st.just(255) | st.integers(0, 255),
        is_eager=st.booleans(),
        faults=faults,
        has_prefix_cache=st.sampled_from([True] * 4 + [False]),
        policy=st.sampled_from(POLICIES),
        pause=st.none() | st.tuples(st.integers(0, 30), st.booleans()),
    )


def run_trace(trace: Trace) -> None:
    driver = trace.driver()
    arrivals, aborts, now = {}, {}, 0
    for seq_id, visit in enumerate(trace.visits):
        now += visit.wait
        arrivals.setdefault(now, []).append(visit.request(seq_id))
        if visit.abort_after is not None:
            aborts.setdefault(now + visit.abort_after, []).append(seq_id)
    for step in range(max([*arrivals, *aborts]) + 1):
        driver.add(*arrivals.get(step, []))
        for seq_id in aborts.get(step, []):
            driver.abort(seq_id)
        if trace.pause is not None and trace.pause[0] == step:
            driver.pause(keeps_pages=trace.pause[1])
            assert driver.step() == []
            driver.core.resume()
        driver.step()
    # Far above the worst seen: every token in a window of its own, and each step read apart.
    work = sum(v.prompt_len + v.max_new_tokens + sum(v.companion_lens) for v in trace.visits)
    driver.run(max_steps=100 + 10 * work)
    assert_order(trace, driver)


def assert_order(trace: Trace, driver: Driver) -> None:
    """Who comes first starts first, where nothing says otherwise: what is being computed for
    another is waited for, and a group that needs many slots lets others pass."""
    is_simple = not trace.has_prefix_cache and not any(v.companion_lens for v in trace.visits)
    if trace.policy.schedule_policy == "fcfs" and is_simple:
        started = [
            row.request.seq_id
            for plan in driver.runner.plans
            if isinstance(plan, PrefillPlan)
            for row in plan.new_rows
        ]
        first = list(dict.fromkeys(started))
        assert first == sorted(first)


SLOW = [HealthCheck.data_too_large, HealthCheck.too_slow]
NORMAL = settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
NIGHTLY = settings(NORMAL, max_examples=5_000)
NO_FAULTS = traces(st.just({}))
FAULTS = traces(
    st.dictionaries(
        st.integers(0, 12) | st.integers(0, 80),
        st.sampled_from(["dispatch", "result"]),
        min_size=1,
        max_size=4,
    )
)


@NORMAL
@given(NO_FAULTS)
def test_every_request_ends_as_if_alone(trace: Trace):
    run_trace(trace)


@NORMAL
@given(FAULTS)
def test_failed_steps_fail_their_own_sequences_only(trace: Trace):
    run_trace(trace)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@NIGHTLY
@given(NO_FAULTS)
def test_every_request_ends_as_if_alone_5000_times(trace: Trace):
    run_trace(trace)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@NIGHTLY
@given(FAULTS)
def test_failed_steps_fail_their_own_sequences_only_5000_times(trace: Trace):
    run_trace(trace)
