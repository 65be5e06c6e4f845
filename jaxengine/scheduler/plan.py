"""What the scheduler tells the runtime to do next. Host values only; knows nothing of arrays on a
device, nor of text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxengine.types import SequenceRequest


class NewRow(NamedTuple):
    """A slot to be filled from scratch: a new sequence, or one whose device state was lost.

    A preempted sequence keeps its slot and all that is in it, so it needs none when it comes back.

    Attributes:
      slot: Which slot.
      request: Its request.
      output_ids: Tokens generated so far, all of which the prefill then computes anew; empty for
        a new sequence.
    """

    slot: int
    request: SequenceRequest
    output_ids: tuple[int, ...]


class PageWrites(NamedTuple):
    """`page_table[slots[i], indices[i]] = pages[i]`, all numbers of a plan side by side.

    A window writes hundreds; as an object each they would be most of what Python's garbage
    collector has to look at.
    """

    slots: list[int]
    indices: list[int]
    pages: list[int]

    @classmethod
    def none(cls) -> "PageWrites":
        """To begin with."""
        return cls([], [], [])

    def add(self, slot: int, first: int, pages: list[int]) -> None:
        """Pages of one slot, from index `first` on."""
        self.slots.extend([slot] * len(pages))
        self.indices.extend(range(first, first + len(pages)))
        self.pages.extend(pages)


class PrefillRow(NamedTuple):
    """A chunk of one sequence.

    Attributes:
      seq_id: Which sequence.
      slot: Its slot.
      token_ids: The chunk's tokens.
      start: Absolute position of the first one.
      draws: The chunk ends a prompt, so the first token is drawn after it.
      sampler_id: Which sampler draws.
      targets: For every token of the chunk the one that follows it in the prompt, whose logprob is
        wanted; -1 where none is. None when no prompt logprobs are wanted at all.
      states: Which tokens of the chunk report their hidden state; None for none.
      embeds: [n, D], instead of the embeddings of its first n tokens.
    """

    seq_id: int
    slot: int
    token_ids: np.ndarray
    start: int
    draws: bool
    sampler_id: int = 0
    targets: np.ndarray | None = None
    states: slice | None = None
    embeds: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class PrefillPlan:
    """One packed prefill call.

    Attributes:
      num_tokens: Bucket of the packed length.
      rows: Chunks, packed in this order.
      new_rows: Slots to fill first.
      page_writes: Page-table entries to write first.
    """

    num_tokens: int
    rows: list[PrefillRow]
    new_rows: list[NewRow] = field(default_factory=list)
    page_writes: PageWrites = field(default_factory=PageWrites.none)

    @property
    def seq_ids(self) -> list[int]:
        """Sequences of the rows, in order."""
        return [row.seq_id for row in self.rows]

    @property
    def draws(self) -> list[bool]:
        """Which rows draw a token."""
        return [row.draws for row in self.rows]


class DecodeRow(NamedTuple):
    """A running sequence and its slot.

    Attributes:
      seq_id: Which sequence.
      slot: Its slot.
      sampler_id: Which sampler draws.
      member: Place in its group of companions, whose rows follow one another; 0 leads, and draws
        for all of them.
    """

    seq_id: int
    slot: int
    sampler_id: int = 0
    member: int = 0


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """One decode window.

    Attributes:
      num_rows: Bucket of the batch.
      num_steps: Steps of the window; rows that end earlier are masked.
      rows: Sequences that decode.
      page_writes: Page-table entries to write first.
    """

    num_rows: int
    num_steps: int
    rows: list[DecodeRow]
    page_writes: PageWrites = field(default_factory=PageWrites.none)

    @property
    def seq_ids(self) -> list[int]:
        """Sequences of the rows, in order."""
        return [row.seq_id for row in self.rows]

    @property
    def draws(self) -> list[bool]:
        """Which rows draw a token: all."""
        return [True] * len(self.rows)


type StepPlan = PrefillPlan | DecodePlan


class StepResult(NamedTuple):
    """What a step brought to the host.

    Attributes:
      token_ids: int32 [rows, steps]; -1 where nothing was drawn, -2 and below where drawing failed
        (`DRAW_ERRORS`).
      leaves: What is reported of every drawn token, by name, itself ("token") included: arrays
        [rows, steps, ...]. "hidden" is of the token that was fed, the one before.
      prompt_leaves: What there is of prompt tokens, by name: for each row of a prefill an array
        [tokens of the chunk, ...], to be read where the row's `targets` are not -1, hidden states
        where its `states` say.
      weights_id: Which parameters the step used.
    """

    token_ids: np.ndarray
    leaves: Mapping[str, np.ndarray] = {}
    prompt_leaves: Mapping[str, list[np.ndarray]] = {}
    weights_id: int = 0
