"""Plans decode windows: whose rows, how many steps, with which new pages.

All of it runs while the device is busy with the window before, for hundreds of rows: what is asked
of every row is asked once, and reckoned with arrays.
"""

from dataclasses import dataclass

import numpy as np

from jaxengine.scheduler.buckets import IsReady
from jaxengine.scheduler.plan import DecodePlan, PageWrites
from jaxengine.scheduler.roster import Roster
from jaxengine.scheduler.sequence import Member, Sequence, Status

STREAM_WINDOW_STEPS = 8
"""Window length while someone reads tokens as they come; and no window is shorter than this because
others wait. One whose prompt is half computed waits no longer."""

WAITING_SHARE = 32
"""While others wait, a window ends when one in so many rows has ended: enough slots and tokens for
a prefill that is worth interrupting all others for, few enough rows that idle until then."""


def plan_decode(roster: Roster, is_ready: IsReady) -> DecodePlan | None:
    """The next window, of fewer steps or sequences where pages are short.

    None when nobody can decode, or when what is under way must be read first: it may end some of
    them, and the others then know all tokens they would lose.
    """
    while batch := _decodable(roster):
        steps = _window_steps(roster, batch)
        while not (has_pages := _has_pages(roster, batch, steps)) and steps > 1:
            steps //= 2
        if has_pages:
            return _plan(roster, batch, steps, is_ready)
        idle = [s for s in roster.running if not s.num_in_flight]
        if any(s.num_in_flight for s in batch.sequences) or not idle:
            return None
        roster.preempt(max(idle, key=roster.policy.rank))
    return None


@dataclass(frozen=True, eq=False)
class _Batch:
    """Who can draw a token, as many as fit a window.

    Attributes:
      sequences: They.
      num_left: Tokens each may still draw.
      members: Their rows, those of a sequence together.
      row_left: `num_left` of each row's sequence.
      row_tokens: Tokens of each row's text, its last one excepted: that is not in the pages.
      row_pages: Pages each row has.
    """

    sequences: list[Sequence]
    num_left: list[int]
    members: list[Member]
    row_left: np.ndarray
    row_tokens: np.ndarray
    row_pages: np.ndarray

    def pages_after(self, steps: int, page_size: int) -> np.ndarray:
        """Pages of each row after a window. The last token drawn takes none: its K/V would only
        serve the next."""
        return -(-(self.row_tokens + np.minimum(steps, self.row_left)) // page_size)


def _decodable(roster: Roster) -> _Batch | None:
    sequences, num_left, members = [], [], []
    row_left, row_tokens, row_pages = [], [], []
    for sequence in roster.running:
        if sequence.status is not Status.RUNNING or (left := sequence.num_left) <= 0:
            continue
        if len(members) + len(sequence.members) > roster.buckets.decode_rows[-1]:
            break
        sequences.append(sequence)
        num_left.append(left)
        for member in sequence.members:
            members.append(member)
            row_left.append(left)
            row_tokens.append(len(member.request.prompt_ids) + sequence.num_scheduled - 1)
            row_pages.append(len(member.pages))
    if not sequences:
        return None
    arrays = (np.asarray(x) for x in (row_left, row_tokens, row_pages))
    return _Batch(sequences, num_left, members, *arrays)


def _window_steps(roster: Roster, batch: _Batch) -> int:
    """Long when nobody waits; short when someone reads along or a slot is wanted soon."""
    longest = max(batch.num_left)
    steps = min(roster.buckets.max_window_steps, longest)
    if any(s.request.is_streaming for s in batch.sequences):
        # What is left after whole windows joins the last one: no window is shorter than these.
        return steps if longest < 2 * STREAM_WINDOW_STEPS else min(steps, STREAM_WINDOW_STEPS)
    if any(s.status is Status.PREFILLING for s in roster.running):
        return min(steps, STREAM_WINDOW_STEPS)
    if roster.waiting:
        first_to_end = sorted(batch.num_left)[len(batch.num_left) // WAITING_SHARE]
        return min(steps, max(STREAM_WINDOW_STEPS, first_to_end))
    return steps


def _has_pages(roster: Roster, batch: _Batch, steps: int) -> bool:
    missing = batch.pages_after(steps, roster.buckets.page_size) - batch.row_pages
    return int(np.maximum(missing, 0).sum()) <= roster.cache.num_available


def _plan(roster: Roster, batch: _Batch, steps: int, is_ready: IsReady) -> DecodePlan:
    page_size = roster.buckets.page_size
    pages = np.maximum(batch.row_pages, batch.pages_after(steps, page_size))
    writes = PageWrites.none()
    for i in np.flatnonzero(pages > batch.row_pages).tolist():
        roster.grow(batch.members[i], int(pages[i]) * page_size)
        batch.members[i].write_pages(writes)
    rows = [member.held_row for member in batch.members]
    for sequence, left in zip(batch.sequences, batch.num_left, strict=True):
        sequence.num_scheduled += min(steps, left)
    num_rows = roster.buckets.size("decode", len(rows), is_ready)
    stats = roster.stats
    stats.num_windows += 1
    stats.num_window_steps += steps
    stats.window_sizes[steps] = stats.window_sizes.get(steps, 0) + 1
    stats.num_decode_rows += len(rows)
    stats.num_decode_padding += num_rows - len(rows)
    stats.num_row_steps += steps * len(rows)
    return DecodePlan(num_rows=num_rows, num_steps=steps, rows=rows, page_writes=writes)
