"""The fixed shapes that programs are compiled for, and which one a batch takes."""

from collections.abc import Callable
from dataclasses import dataclass

type IsReady = Callable[[str, int], bool]
"""Says of a kind ("prefill", "decode") and a size whether that program is compiled."""

MAX_PADDING = 256
"""Places a prefill may leave empty whatever its size: they cost less than another prefill."""


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """All sizes a compiled program can have.

    Attributes:
      decode_rows: Batch sizes of decode windows, ascending.
      prefill_tokens: Packed lengths of prefills, ascending.
      num_slots: Sequences that may run at once.
      page_size: Tokens in a page.
      max_window_steps: Longest decode window.
    """

    decode_rows: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    num_slots: int
    page_size: int
    max_window_steps: int

    def prefill_rows(self, num_tokens: int) -> int:
        """Rows of a prefill of this bucket: a fixed number, about one per 32 tokens."""
        return min(self.num_slots, max(8, num_tokens // 32), num_tokens)

    def full_prefill(self, num_tokens: int, num_rows: int) -> int:
        """Tokens of a prefill that wastes little: all, or as many as fill a smaller bucket.

        Args:
          num_tokens: Tokens that wait.
          num_rows: Prompts they are of.
        """
        sizes = self.prefill_tokens
        fits = (t for t in sizes if t >= num_tokens and self.prefill_rows(t) >= num_rows)
        size = next(fits, sizes[-1])
        if size - num_tokens <= max(MAX_PADDING, size // 8):
            return size
        smaller = (t for t in sizes if size // 4 <= t <= num_tokens)
        # Short prompts may take all rows of a bucket before they fill its tokens.
        full = (t for t in smaller if self.prefill_rows(t) * num_tokens >= t * num_rows)
        return max(full, default=size)

    @property
    def split_rows(self) -> tuple[int, ...]:
        """Rows whose logits the split form hands from the model to a sampler: for a few sequences,
        and for all. Only two, since each is a program to wait for after a sampler was edited."""
        return tuple(sorted({min(8, self.num_slots), self.num_slots}))

    def split_size(self, num_rows: int) -> int:
        """The smallest of them with room for so many rows."""
        return min(rows for rows in self.split_rows if rows >= num_rows)

    def page_writes(self, num_rows: int) -> int:
        """Page-table entries a decode window of this bucket may write."""
        per_row = -(-self.max_window_steps // self.page_size) + 1
        return num_rows * per_row

    def size(self, kind: str, needed: int, is_ready: IsReady) -> int:
        """The smallest size that fits; one whose program is ready now is preferred.

        Args:
          kind: "prefill" or "decode".
          needed: Packed tokens, or rows.
          is_ready: Which programs are compiled.
        """
        sizes = self.decode_rows if kind == "decode" else self.prefill_tokens
        fits = [size for size in sizes if size >= needed]
        return next((size for size in fits if is_ready(kind, size)), fits[0])
