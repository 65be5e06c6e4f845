"""Plans decode windows: whose rows, how many steps, with which new pages."""

from collections.abc import Callable

from jaxengine.scheduler.plan import DecodePlan, DecodeRow, PageWrite
from jaxengine.scheduler.roster import Roster
from jaxengine.scheduler.sequence import Sequence, Status

STREAM_WINDOW_STEPS = 8
"""Window length while someone reads tokens as they come, or waits for a slot."""


def plan_decode(roster: Roster, is_ready: Callable[..., bool]) -> DecodePlan | None:
    """The next window, of fewer steps or sequences where pages are short.

    None when nobody can decode, or when what is under way must be read first: it may end some of
    them, and the others then know all tokens they would lose.
    """
    while sequences := _decodable(roster):
        steps = _window_steps(roster, sequences)
        while steps > 1 and not _has_pages(roster, sequences, steps):
            steps //= 2
        if _has_pages(roster, sequences, steps):
            return _plan(roster, sequences, steps, is_ready)
        idle = [s for s in roster.running if not s.num_in_flight]
        if any(s.num_in_flight for s in sequences) or not idle:
            return None
        roster.preempt(max(idle, key=roster.policy.rank))
    return None


def _decodable(roster: Roster) -> list[Sequence]:
    """Who can draw a token, as many as fit a window."""
    able, num_rows = [], 0
    for sequence in roster.running:
        if sequence.status is Status.RUNNING and sequence.num_left > 0:
            num_rows += len(sequence.members)
            if num_rows > roster.buckets.decode_rows[-1]:
                break
            able.append(sequence)
    return able


def _window_steps(roster: Roster, sequences: list[Sequence]) -> int:
    """Long when nobody waits; short when someone reads along or a slot is wanted soon."""
    longest = max(s.num_left for s in sequences)
    steps = min(roster.buckets.max_window_steps, longest)
    if any(s.request.is_streaming for s in sequences):
        # What is left after whole windows joins the last one: no window is shorter than these.
        return steps if longest < 2 * STREAM_WINDOW_STEPS else min(steps, STREAM_WINDOW_STEPS)
    if roster.waiting:
        first_to_end = max(STREAM_WINDOW_STEPS, min(s.num_left for s in sequences))
        return min(steps, first_to_end)
    return steps


def _num_written(sequence: Sequence, prompt_len: int, steps: int) -> int:
    """Tokens in the pages after a window. The last one drawn is not: its K/V would only serve the
    next."""
    return prompt_len + sequence.num_scheduled + min(steps, sequence.num_left) - 1


def _has_pages(roster: Roster, sequences: list[Sequence], steps: int) -> bool:
    needed = 0
    for sequence in sequences:
        for member in sequence.members:
            num_tokens = _num_written(sequence, len(member.request.prompt_ids), steps)
            needed += max(0, roster.num_pages(num_tokens) - len(member.pages))
    return needed <= roster.cache.num_available


def _plan(
    roster: Roster, sequences: list[Sequence], steps: int, is_ready: Callable[..., bool]
) -> DecodePlan:
    rows: list[DecodeRow] = []
    writes: list[PageWrite] = []
    longest = 0
    for sequence in sequences:
        for i, member in enumerate(sequence.members):
            roster.grow(member, _num_written(sequence, len(member.request.prompt_ids), steps))
            writes += member.take_page_writes()
            sampler_id = sequence.request.sampler_id
            rows.append(DecodeRow(member.request.seq_id, member.held_slot, sampler_id, i))
            longest = max(longest, len(member.pages) * roster.buckets.page_size)
        sequence.num_scheduled += min(steps, sequence.num_left)
    num_rows, num_pages = roster.buckets.shape("decode", len(rows), longest, is_ready)
    stats = roster.stats
    stats.num_windows += 1
    stats.num_window_steps += steps
    stats.window_sizes[steps] = stats.window_sizes.get(steps, 0) + 1
    stats.num_decode_rows += len(rows)
    stats.num_decode_padding += num_rows - len(rows)
    stats.num_row_steps += steps * len(rows)
    return DecodePlan(
        num_rows=num_rows, num_pages=num_pages, num_steps=steps, rows=rows, page_writes=writes
    )
