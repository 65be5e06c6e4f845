"""A device made of Python: runs plans in order, as `runtime/decode_loop.py` does, and checks every
page it reads. It knows plans and nothing else of the scheduler. No jax."""

import itertools
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.plan import (
    DecodePlan,
    DecodeRow,
    NewRow,
    PageWrites,
    PrefillPlan,
    PrefillRow,
    StepPlan,
    StepResult,
)
from jaxengine.types import NULL_PAGE, SequenceRequest, StopReason

type Fault = Literal["dispatch", "result"]

VOCAB_SIZE = 64
NAN_TOKEN = -2


class InjectedFault(RuntimeError):
    """A device failure a test asked for."""


class Ending(NamedTuple):
    """What a request gives when it is alone in the world; `finish` is None after NaN logits."""

    token_ids: list[int]
    finish: StopReason | None


def make_request(
    seq_id: int,
    prompt_len: int,
    max_new_tokens: int,
    *,
    script: Mapping[int, int] | None = None,
    stop_token_ids: tuple[int, ...] = (),
    seed: int = 0,
    min_new_tokens: int = 0,
    ignore_eos: bool = False,
    is_streaming: bool = False,
    wants_logprobs: bool = False,
    prompt_ids: Sequence[int] | None = None,
    **others: Any,
) -> SequenceRequest:
    """A request; `script` says which token is drawn at some places of its output."""
    if prompt_ids is None:
        ids = (np.arange(prompt_len) * (2 * seed + 3) + seed + seq_id) % VOCAB_SIZE
    else:
        ids = np.asarray(prompt_ids)
    return SequenceRequest(
        seq_id=seq_id,
        rid=f"request-{seq_id}",
        prompt_ids=ids.astype(np.int32),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
        seed=seed,
        values={"script": script or {}},
        is_streaming=is_streaming,
        wants_logprobs=wants_logprobs,
        **others,
    )


def draw(request: SequenceRequest, position: int, last_token: int) -> int:
    """The token at a position: scripted, or a function of (seed, position, last token)."""
    num_generated = position - len(request.prompt_ids)
    scripted = request.values["script"].get(num_generated)
    if scripted is not None:
        return scripted
    mixed = (request.seed * 1000003 + position * 8191 + last_token * 131 + 7) * 2654435761
    token = (mixed >> 16) % VOCAB_SIZE
    while num_generated < request.min_new_tokens and token in request.stop_token_ids:
        token = (token + 1) % VOCAB_SIZE
    return token


def logprob_of(token: Any) -> Any:
    """Of a token or an array of them; exact in float32."""
    return -(token + 1) / 8


def oracle(request: SequenceRequest) -> Ending:
    """One request alone, step by step."""
    tokens: list[int] = []
    last, start = int(request.prompt_ids[-1]), len(request.prompt_ids)
    while True:
        last = draw(request, start + len(tokens), last)
        if last == NAN_TOKEN:
            return Ending(tokens, None)
        if request.max_new_tokens > 0:
            tokens.append(last)
        if len(tokens) >= request.max_new_tokens:
            return Ending(tokens, StopReason("length", length=request.max_new_tokens))
        if last in request.stop_token_ids and not request.ignore_eos:
            return Ending(tokens, StopReason("stop", matched=last))


def marks_of(namespace: Hashable, tokens: np.ndarray) -> np.ndarray:
    """What K/V is, for every token of a text: a number of the token and all before it."""
    marks, mark = np.zeros(len(tokens), np.int64), hash(namespace)
    for i, token in enumerate(tokens.tolist()):
        mark = marks[i] = hash((mark, token)) >> 1
    return marks


@dataclass
class FakeSlot:
    """A row of the slot table.

    Attributes:
      request: Whose row it is.
      text: Its prompt, and what its leader will have drawn at the end.
      marks: What must stand in the pages for every position of the text.
      page_table: Page ids.
      token: Last token drawn, not yet in the pages.
      position: Where it will be written.
      num_generated: Tokens drawn.
      is_done: Masked from now on.
      num_drawn: What a sampler keeps of the sequence: a count of its draws; None after a reset.
    """

    request: SequenceRequest
    text: np.ndarray
    marks: np.ndarray
    page_table: np.ndarray
    token: int = 0
    position: int = 0
    num_generated: int = 0
    is_done: bool = False
    num_drawn: int | None = 0

    def draw(self, position: int, last_token: int) -> int:
        """Draws the token at `position` and tests whether it ends the sequence."""
        request = self.request
        if self.num_drawn is not None:
            assert self.num_drawn == self.num_generated, "the sampler lost its state"
            self.num_drawn += 1
        self.token, self.position = draw(request, position, last_token), position
        self.num_generated += 1
        is_stop = self.token in request.stop_token_ids and not request.ignore_eos
        is_last = self.num_generated >= request.max_new_tokens
        self.is_done = self.token < 0 or is_stop or is_last
        return self.token

    def follow(self, leader: "FakeSlot") -> int:
        """Goes on with the token a leader has drawn."""
        self.token, self.is_done = leader.token, leader.is_done
        self.num_generated = leader.num_generated
        self.position += 1
        return self.token


class FakeHandle:
    """A step in the queue of the device; its result is there once it was asked for."""

    def __init__(self, runner: "FakeRunner", plan: StepPlan, fault: Fault | None) -> None:
        self.plan = plan
        self.fault = fault
        self.value: StepResult | None = None
        self._runner = runner

    def result(self) -> StepResult:
        return self._runner.read(self)


class FakeRunner:
    """Stands where the runtime's Runner stands; see `core.StepRunner`.

    Args:
      buckets: Shapes a plan may have.
      num_pages: Pages of the cache, the null page included.
      faults: Number of a dispatch, from 0, and where it fails.
      is_eager: Run a step when it is dispatched, not when its result (or a later one) is read;
        `written` then holds the pages that were written since it was last cleared.
      failing_resets: Numbers of resets that find no memory; 1 is at the start.
    """

    def __init__(
        self,
        buckets: Buckets,
        num_pages: int,
        faults: Mapping[int, Fault] | None = None,
        is_eager: bool = False,
        failing_resets: Collection[int] = (),
    ) -> None:
        self._failing_resets = failing_resets
        self._buckets = buckets
        self._num_pages = num_pages
        self._faults = faults or {}
        self._is_eager = is_eager
        self._texts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._leaders: dict[int, SequenceRequest] = {}
        self.plans: list[StepPlan] = []
        self.failed: list[StepPlan] = []
        self.written: set[int] = set()
        self.num_reads = 0
        self.num_resets = 0
        self.reset()

    def reset(self) -> None:
        self.num_resets += 1
        self._is_broken = True
        if self.num_resets in self._failing_resets:
            raise MemoryError("no room for the pages")
        self._is_broken = False
        self._queue: deque[FakeHandle] = deque()
        self._unread: deque[FakeHandle] = deque()
        self._slots: list[FakeSlot | None] = [None] * self._buckets.num_slots
        self._kv = np.full((self._num_pages, self._buckets.page_size), -1)

    def dispatch(self, plan: StepPlan) -> FakeHandle:
        assert not self._is_broken, "a failed device was used again without a reset"
        number = len(self.plans)
        self.plans.append(plan)
        check_shapes(plan, self._buckets)
        handle = FakeHandle(self, plan, self._faults.get(number))
        if handle.fault == "dispatch":
            self._fail(plan)
        self._queue.append(handle)
        self._unread.append(handle)
        if self._is_eager:
            self._run_until(handle)
        return handle

    def read(self, handle: FakeHandle) -> StepResult:
        """The result of a step, after all that were dispatched before it."""
        assert self._unread.popleft() is handle, "results are read out of order, or after a failure"
        if handle.fault == "result":
            self._unread.clear()
            self._fail(handle.plan)
        self._run_until(handle)
        assert handle.value is not None
        self.num_reads += 1
        return handle.value

    def _fail(self, plan: StepPlan) -> None:
        self._is_broken = True
        self.failed.append(plan)
        raise InjectedFault("the device caught fire")

    def _run_until(self, handle: FakeHandle) -> None:
        while handle.value is None:
            first = self._queue.popleft()
            plan = first.plan
            is_prefill = isinstance(plan, PrefillPlan)
            first.value = self._prefill(plan) if is_prefill else self._decode(plan)

    def _prefill(self, plan: PrefillPlan) -> StepResult:
        for row in plan.new_rows:
            self._slots[row.slot] = self._new_slot(row)
        self._write_pages(plan.page_writes)
        token_ids = np.full((len(plan.rows), 1), -1, np.int32)
        slots = [self._slot(row) for row in plan.rows]
        for slot, row in zip(slots, plan.rows, strict=True):
            # Not what other rows of this plan bring: it is not there before they are computed.
            self._attend(slot, row.start)
        for slot, row in zip(slots, plan.rows, strict=True):
            self._feed(slot, row.start, row.token_ids)
        for i, (slot, row) in enumerate(zip(slots, plan.rows, strict=True)):
            kv_len = row.start + len(row.token_ids)
            self._attend(slot, kv_len)
            if row.draws:
                token_ids[i, 0] = slot.draw(kv_len, int(row.token_ids[-1]))
        targets = [np.full(1, -1) if row.targets is None else row.targets for row in plan.rows]
        prompt_leaves = {"logprob": [np.where(t >= 0, logprob_of(t), 0.0) for t in targets]}
        return self._result(slots, token_ids)._replace(prompt_leaves=prompt_leaves)

    def _decode(self, plan: DecodePlan) -> StepResult:
        self._write_pages(plan.page_writes)
        token_ids = np.full((len(plan.rows), self._buckets.max_window_steps), -1, np.int32)
        slots = [self._slot(row) for row in plan.rows]
        for step in range(plan.num_steps):
            active = [(i, slot) for i, slot in enumerate(slots) if not slot.is_done]
            if not active:
                break
            for _, slot in active:
                self._feed(slot, slot.position, np.asarray([slot.token]))
            for i, slot in active:
                self._attend(slot, slot.position + 1)
                member = plan.rows[i].member
                if member == 0:
                    token_ids[i, step] = slot.draw(slot.position + 1, slot.token)
                else:
                    token_ids[i, step] = slot.follow(slots[i - member])
        return self._result(slots, token_ids)

    def _new_slot(self, row: NewRow) -> FakeSlot:
        request, num_outputs = row.request, len(row.output_ids)
        self._leaders |= {companion.seq_id: request for companion in request.companions}
        text, marks = self._expected(request)
        page_table = np.zeros(self._num_pages, np.int64)
        position = len(request.prompt_ids) + num_outputs - 1
        slot = FakeSlot(request, text, marks, page_table, int(text[position]), position)
        if num_outputs:
            assert not request.is_stateful, "a stateful sampler goes on without its state"
            slot.num_generated, slot.num_drawn = num_outputs, None
        return slot

    def _expected(self, request: SequenceRequest) -> tuple[np.ndarray, np.ndarray]:
        if request.seq_id not in self._texts:
            leader = self._leaders.get(request.seq_id, request)
            text = np.concatenate([request.prompt_ids, np.asarray(oracle(leader).token_ids, int)])
            self._texts[request.seq_id] = text, marks_of(request.cache_namespace, text)
        return self._texts[request.seq_id]

    def _write_pages(self, writes: PageWrites) -> None:
        for slot_id, index, page in zip(*writes, strict=True):
            slot = self._slots[slot_id]
            assert slot is not None, "a page is written into an empty slot"
            assert 0 < page < self._num_pages, f"there is no page {page} to hand out"
            if index == 0:  # new, or back after a preemption
                slot.page_table[:] = NULL_PAGE
            assert slot.page_table[index] == NULL_PAGE, "a page is replaced while in use"
            slot.page_table[index] = page

    def _slot(self, row: PrefillRow | DecodeRow) -> FakeSlot:
        slot = self._slots[row.slot]
        assert slot is not None and slot.request.seq_id == row.seq_id, "a row is in a foreign slot"
        return slot

    def _feed(self, slot: FakeSlot, start: int, tokens: np.ndarray) -> None:
        positions = np.arange(start, start + len(tokens))
        pages = slot.page_table[positions // self._buckets.page_size]
        assert pages.all(), f"sequence {slot.request.seq_id} writes into the null page"
        assert np.array_equal(tokens, slot.text[positions]), "a wrong token is fed"
        if self._is_eager:
            self.written.update(pages.tolist())
        self._kv[pages, positions % self._buckets.page_size] = slot.marks[positions]

    def _attend(self, slot: FakeSlot, kv_len: int) -> None:
        """The text up to `kv_len` must stand in the row's pages."""
        num_read = -(-kv_len // self._buckets.page_size)
        pages = slot.page_table[:num_read]
        got = self._kv[pages].reshape(-1)[:kv_len]
        if not np.array_equal(got, slot.marks[:kv_len]):
            wrong = np.flatnonzero(got != slot.marks[: len(got)])
            raise AssertionError(f"sequence {slot.request.seq_id} reads wrong K/V at {wrong}")

    def _result(self, slots: list[FakeSlot], token_ids: np.ndarray) -> StepResult:
        wants = np.asarray([slot.request.wants_logprobs for slot in slots], bool)[:, None]
        logprobs = np.where(wants & (token_ids >= 0), logprob_of(token_ids), 0)
        return StepResult(token_ids, {"logprob": logprobs.astype(np.float32)})


def check_shapes(plan: StepPlan, buckets: Buckets) -> None:
    """Asserts that a plan fits one of the compiled programs."""
    slots = [row.slot for row in plan.rows]
    assert 0 < len(slots) == len(set(slots)), "a plan has no rows, or a slot twice"
    assert {*plan.page_writes.slots} <= set(slots)
    if isinstance(plan, DecodePlan):
        assert plan.num_rows in buckets.decode_rows and len(slots) <= plan.num_rows
        assert 0 < plan.num_steps <= buckets.max_window_steps
        assert len(plan.page_writes.pages) <= buckets.page_writes(plan.num_rows)
        members = [row.member for row in plan.rows]
        for before, member in itertools.pairwise([-1, *members]):
            assert member in (0, before + 1), "a group is torn apart"
        return
    lens = [len(row.token_ids) for row in plan.rows]
    assert plan.num_tokens in buckets.prefill_tokens
    assert min(lens) > 0 and sum(lens) <= plan.num_tokens
    assert len(slots) <= buckets.prefill_rows(plan.num_tokens)
    assert {row.slot for row in plan.new_rows} <= set(slots)
    assert len({row.slot for row in plan.new_rows}) == len(plan.new_rows)
