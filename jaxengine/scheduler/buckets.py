"""The fixed shapes that programs are compiled for, and which one a batch takes."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """All sizes a compiled program can have.

    Attributes:
      decode_rows: Batch sizes of decode windows, ascending.
      prefill_tokens: Packed lengths of prefills, ascending.
      num_pages: Pages a sequence may have, ascending; one entry where a kernel stops at each
        row's length, several where plain XLA reads them all.
      num_slots: Sequences that may run at once.
      page_size: Tokens in a page.
      max_window_steps: Longest decode window.
    """

    decode_rows: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    num_pages: tuple[int, ...]
    num_slots: int
    page_size: int
    max_window_steps: int

    def prefill_rows(self, num_tokens: int) -> int:
        """Rows of a prefill of this bucket: a fixed number, about one per 32 tokens."""
        return min(self.num_slots, max(8, num_tokens // 32), num_tokens)

    def page_writes(self, num_rows: int) -> int:
        """Page-table entries a decode window of this bucket may write."""
        per_row = -(-self.max_window_steps // self.page_size) + 1
        return num_rows * per_row
