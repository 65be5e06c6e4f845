"""Generated ids to text, as they come, and the search for stop strings in it.

Works in bytes: token bytes are joined, searched and cut, and only then decoded as UTF-8. Stop
strings are whole characters, so a match of bytes is a match of text. Knows nothing of requests.
"""

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from jaxengine.text.patterns import PatternSearch

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one sample, exact however its ids are split into pushes.

    With a byte-level tokenizer the joined deltas are `tokenizer.decode(ids)`, also for invalid
    UTF-8: only a tail that may still become a character, or a stop string, is held back. With
    another tokenizer the same holds as long as a token's text depends on the token before it only,
    and the text is valid UTF-8. A push costs what its ids cost (and those of the push before it).

    Attributes:
      matched: The stop string or pattern that ended the text, else None.
      num_tokens: Ids taken in; after a match, those up to the one that completed it.
    """

    def __init__(
        self,
        vocabulary: "Vocabulary",
        *,
        stop: Sequence[str] = (),
        stop_regex: Sequence[str] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        no_stop_trim: bool = False,
    ) -> None:
        """Starts an empty text.

        Args:
          vocabulary: Shared by all samples of a tokenizer.
          stop: Strings that end the text, none empty. They are searched with special tokens
            visible, and the one that ends first wins.
          stop_regex: Patterns that end the text, likewise; as soon as there is a match, so "a+"
            matches a single "a".
          skip_special_tokens: Leave special tokens out of the text.
          spaces_between_special_tokens: Passed to tokenizers that know it.
          no_stop_trim: Keep the stop string, or the stop token, in the text.
        """
        self.matched: str | None = None
        self.num_tokens = 0
        self._stops = [(text, text.encode()) for text in stop]
        self._patterns = PatternSearch(stop_regex) if stop_regex else None
        self._no_stop_trim = no_stop_trim
        self._shown = vocabulary.reader(skip_special_tokens, spaces_between_special_tokens)
        self._seen = vocabulary.reader(False, spaces_between_special_tokens)
        # (bytes the search sees, bytes the text shows) of the tokens not wholly given out.
        self._held: list[tuple[bytes, bytes]] = []
        self._tail = b""  # the seen bytes of `_held`
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text so far, without what is held back."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def push(self, ids: Sequence[int], *, is_stopped: bool = False) -> str:
        """Takes new ids and returns the text they add; ids after a match are dropped.

        Args:
          ids: New ids, in order.
          is_stopped: The last of them is a stop token: searched, but not shown unless
            `no_stop_trim`.
        """
        if self.matched is not None:
            return ""
        num_shown = len(ids) - (is_stopped and not self._no_stop_trim)
        if not self._stops and not self._patterns:
            self.num_tokens += len(ids)
            return self._emit(self._shown.read(ids[:num_shown]))
        data = b""
        for i, token_id in enumerate(ids):
            self.num_tokens += 1
            data += self._search(
                self._seen.read((token_id,)),
                self._shown.read((token_id,)) if i < num_shown else b"",
            )
            if self.matched is not None:
                return self._emit(data, is_final=True)
        return self._emit(data)

    def finish(self) -> str:
        """Returns the text that was held back; nothing after a match."""
        if self.matched is not None:
            return ""
        held = b"".join(shown for _, shown in self._held)
        self._held, self._tail = [], b""
        return self._emit(held + self._shown.finish(), is_final=True)

    def _emit(self, data: bytes, is_final: bool = False) -> str:
        delta = self._utf8.decode(data, is_final)
        if delta:
            self._parts.append(delta)
        return delta

    def _search(self, seen: bytes, shown: bytes) -> bytes:
        self._held.append((seen, shown))
        self._tail += seen
        size = len(self._tail)
        ends = [
            (start + len(stop), start, text)
            for text, stop in self._stops
            if (start := self._tail.find(stop)) >= 0
        ]
        held = [_overlap(self._tail, stop) for _, stop in self._stops]
        if self._patterns is not None:
            if hit := self._patterns.push(seen):
                ends.append((size - hit.end, max(0, size - hit.start), hit.pattern))
            else:
                held.append(min(size, self._patterns.num_held))
        if ends:
            end, start, self.matched = min(ends)
            return self._release(end if self._no_stop_trim else start)
        return self._release(size - max(held))

    def _release(self, num_seen: int) -> bytes:
        """Gives out the shown bytes of the first `num_seen` seen ones."""
        self._tail = self._tail[num_seen:]
        data = b""
        while self._held and num_seen >= len(self._held[0][0]):
            seen, shown = self._held.pop(0)
            num_seen -= len(seen)
            data += shown
        if num_seen:
            # Where they differ, `shown` lacks the start of `seen`: a space, or all of it.
            seen, shown = self._held[0]
            split = max(0, num_seen - (len(seen) - len(shown)))
            data += shown[:split]
            self._held[0] = (seen[num_seen:], shown[split:])
        return data


class Vocabulary:
    """How a tokenizer's ids become bytes; one for all samples."""

    def __init__(self, tokenizer: Any) -> None:
        """Takes a Hugging Face tokenizer, fast or not."""
        self._tokenizer = tokenizer
        if tokenizer.is_fast:
            added = tokenizer.added_tokens_decoder
            self._special_ids = {i for i, token in added.items() if token.special}
        else:
            self._special_ids = set(tokenizer.all_special_ids)
        self._is_byte_level = _is_byte_level(tokenizer)
        self._all = _TokenBytes(tokenizer, set())
        self._shown = _TokenBytes(tokenizer, self._special_ids)

    def reader(self, skip_special_tokens: bool, spaces_between_special_tokens: bool) -> "_Reader":
        """A reader of one sample's ids."""
        if self._is_byte_level:
            return self._shown if skip_special_tokens else self._all
        hidden = self._special_ids if skip_special_tokens else set()
        return _WindowReader(self._tokenizer, hidden, spaces_between_special_tokens)


class _Reader(Protocol):
    def read(self, ids: Sequence[int]) -> bytes:
        """What these ids add; whole characters, or all bytes of byte-level tokens."""
        ...

    def finish(self) -> bytes:
        """What was held back."""
        ...


class _TokenBytes(dict[int, bytes]):
    """Bytes of each id of a byte-level tokenizer, which joined and decoded are the text."""

    def __init__(self, tokenizer: Any, hidden: set[int]) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.backend_tokenizer.id_to_token(token_id) or ""
        try:
            self[token_id] = bytes(_BYTE_OF_CHAR[char] for char in token)
        except KeyError:
            self[token_id] = token.encode()  # an added token in plain text
        return self[token_id]

    def read(self, ids: Sequence[int]) -> bytes:
        return b"".join([self[token_id] for token_id in ids])

    def finish(self) -> bytes:
        return b""


class _WindowReader:
    """Decodes new ids together with those of the last read that gave text.

    Source: the prefix and read offsets of SGLang's detokenizer_manager.py.
    """

    _MAX_HELD = 16  # reads after which a tail is taken to be invalid, not incomplete

    def __init__(self, tokenizer: Any, hidden: set[int], spaces_between: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._spaces_between = spaces_between
        self._ids: list[int] = []
        self._num_context = 0
        self._context_len = 0  # characters
        self._num_held = 0

    def read(self, ids: Sequence[int]) -> bytes:
        ids = [i for i in ids if i not in self._hidden]
        if not ids:
            return b""
        self._ids += ids
        new = self._decode()[self._context_len :]
        if (not new or new.endswith(_REPLACEMENT)) and self._num_held < self._MAX_HELD:
            self._num_held += 1
            return b""
        self._num_held = 0
        del self._ids[: self._num_context]
        self._num_context = len(self._ids)
        self._context_len = len(self._decode())
        return new.encode()

    def finish(self) -> bytes:
        return self._decode()[self._context_len :].encode()

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._ids,
            skip_special_tokens=bool(self._hidden),
            spaces_between_special_tokens=self._spaces_between,
        )


def _overlap(data: bytes, stop: bytes) -> int:
    """Length of the longest tail of `data` that begins `stop`: 2 for b"xab" and b"abc"."""
    start = max(0, len(data) - len(stop) + 1)
    while (start := data.find(stop[:1], start)) >= 0:
        if stop.startswith(data[start:]):
            return len(data) - start
        start += 1
    return 0


def _is_byte_level(tokenizer: Any) -> bool:
    if not tokenizer.is_fast:
        return False
    backend = tokenizer.backend_tokenizer
    if type(backend.decoder).__name__ != "ByteLevel":
        return False
    cleans_bpe = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return not tokenizer.clean_up_tokenization_spaces or (
        type(backend.model).__name__ == "BPE" and not getattr(tokenizer, cleans_bpe, True)
    )


def _byte_of_char() -> dict[str, int]:
    """Bytes that print stand for themselves; the others take the characters from 256 on.

    Source: `bytes_to_unicode` of GPT-2's encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    return chars | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
