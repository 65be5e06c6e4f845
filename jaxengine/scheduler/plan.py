"""What the scheduler tells the runtime to do next. Host values only; knows nothing of arrays on a
device, nor of text."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxengine.types import SequenceRequest


class NewRow(NamedTuple):
    """A slot to be filled from scratch: a new sequence, or a preempted one that comes back.

    Attributes:
      slot: Which slot.
      request: Its request.
      output_ids: Tokens generated so far; empty for a new sequence.
    """

    slot: int
    request: SequenceRequest
    output_ids: tuple[int, ...]


class PageWrite(NamedTuple):
    """`page_table[slot, index] = page`."""

    slot: int
    index: int
    page: int


class PrefillRow(NamedTuple):
    """A chunk of one sequence.

    Attributes:
      seq_id: Which sequence.
      slot: Its slot.
      token_ids: The chunk's tokens.
      start: Absolute position of the first one.
      draws: The chunk ends a prompt, so the first token is drawn after it.
    """

    seq_id: int
    slot: int
    token_ids: np.ndarray
    start: int
    draws: bool


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """One packed prefill call.

    Attributes:
      num_tokens: Bucket of the packed length.
      num_pages: Bucket of pages a sequence may have.
      rows: Chunks, packed in this order.
      new_rows: Slots to fill first.
      page_writes: Page-table entries to write first.
    """

    num_tokens: int
    num_pages: int
    rows: list[PrefillRow]
    new_rows: list[NewRow] = field(default_factory=list)
    page_writes: list[PageWrite] = field(default_factory=list)

    @property
    def seq_ids(self) -> list[int]:
        """Sequences of the rows, in order."""
        return [row.seq_id for row in self.rows]


class DecodeRow(NamedTuple):
    """A running sequence and its slot."""

    seq_id: int
    slot: int


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """One decode window.

    Attributes:
      num_rows: Bucket of the batch.
      num_pages: Bucket of pages a sequence may have.
      num_steps: Steps of the window; rows that end earlier are masked.
      rows: Sequences that decode.
      page_writes: Page-table entries to write first.
    """

    num_rows: int
    num_pages: int
    num_steps: int
    rows: list[DecodeRow]
    page_writes: list[PageWrite] = field(default_factory=list)

    @property
    def seq_ids(self) -> list[int]:
        """Sequences of the rows, in order."""
        return [row.seq_id for row in self.rows]


type StepPlan = PrefillPlan | DecodePlan


class StepResult(NamedTuple):
    """What a step brought to the host.

    Attributes:
      token_ids: int32 [rows, steps]; -1 where nothing was drawn, -2 where the logits held NaN.
      logprobs: float32 [rows, steps]; 0 where not asked for.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
