"""Where the first match of some patterns ends in a text that grows. Knows nothing of tokens."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

import regex

from jaxengine.errors import RequestError

TIMEOUT_S = 1.0
"""Longest search; a pattern that backtracks without end fails its request, and nobody else's."""


def compile_pattern(pattern: str) -> regex.Pattern:
    """A pattern of `stop_regex`.

    Raises:
      RequestError: For what is no regular expression, or matches nothing at all.
    """
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise RequestError(f"`stop_regex` {pattern!r} is no regular expression: {error}.") from None
    if compiled.search(""):
        raise RequestError(f"`stop_regex` {pattern!r} matches the empty text, so it always stops.")
    return compiled


class Hit(NamedTuple):
    """A match, counted in bytes from the end of the text: it starts and ends so many before it."""

    start: int
    end: int
    pattern: str


class PatternSearch:
    """Looks for matches as bytes come, and says how much of the end may still become one.

    A match that begins in the text so far and ends later is a partial match now; so nothing before
    the first of these has to be looked at again.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Takes patterns that `compile_pattern` accepts."""
        self._patterns = [compile_pattern(pattern) for pattern in patterns]
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._first = 0

    def push(self, data: bytes) -> Hit | None:
        """Takes the next bytes; gives the match that ends first, if there is any."""
        self._text += self._decoder.decode(data)
        found = self._search(partial=False)
        if found:
            match = min(found, key=lambda m: (m.end(), m.start()))
            return Hit(
                self._bytes_after(match.start()), self._bytes_after(match.end()), match.re.pattern
            )
        partial = self._search(partial=True)
        self._first = min((match.start() for match in partial), default=len(self._text))
        return None

    @property
    def num_held(self) -> int:
        """Bytes at the end that may be the beginning of a match."""
        return self._bytes_after(self._first)

    def _search(self, *, partial: bool) -> list[regex.Match]:
        try:
            found = [
                pattern.search(self._text, self._first, partial=partial, timeout=TIMEOUT_S)
                for pattern in self._patterns
            ]
        except TimeoutError:
            patterns = ", ".join(pattern.pattern for pattern in self._patterns)
            raise RequestError(
                f"`stop_regex` {patterns!r} took longer than {TIMEOUT_S:g} s on one text; "
                "write it so that it backtracks less."
            ) from None
        return [match for match in found if match]

    def _bytes_after(self, place: int) -> int:
        incomplete, _ = self._decoder.getstate()
        return len(self._text[place:].encode("utf-8", "surrogateescape")) + len(incomplete)
