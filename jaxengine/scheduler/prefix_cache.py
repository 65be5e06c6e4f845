"""KV pages kept for texts that begin alike. Owns page ids and tokens; knows nothing of sequences.

A hash chain: a full page is found by the page before it and by its own tokens, so equal prefixes
find the same pages. What a page holds depends on all tokens before it, and on nothing else.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from jaxengine.scheduler.page_pool import PagePool

TOKEN_BYTES = 4


type Root = tuple[int, Hashable]
"""Where the texts of a namespace begin: how many flushes there were before, and its name. None is
found any more after the next flush."""

type Prefix = Root | int
"""The beginning of a text: none of it, or all up to and including a cached page, by its id. It
means the same as long as somebody holds it."""

type Key = tuple[Prefix, bytes]
"""By what a page is found: what stands before it, and its own tokens."""


class Match(NamedTuple):
    """The cached beginning of a text.

    Attributes:
      prefix: Its end.
      pages: Its page ids.
      num_unused: How many of them nobody holds, and holding them makes unavailable.
    """

    prefix: Prefix
    pages: list[int]
    num_unused: int


class PrefixCache:
    """Hands out the pages of a pool, and keeps those that are given back as long as there is room.

    Every page taken has one owner: a member, or the cache. A page of the cache is full and never
    written again; who holds it holds those before it, too. It is a number in some dicts and no
    object of its own: of these there would be a hundred thousands, and Python's garbage collector
    goes over all objects there are, while every thread stands still.
    """

    def __init__(self, pool: PagePool, page_size: int, *, is_enabled: bool = True) -> None:
        self._pool = pool
        self._page_size = page_size
        self._is_enabled = is_enabled
        self._num_flushes = 0
        self._pages: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        # Pages of the text up to each, itself included; members that hold it.
        self._num_pages: dict[int, int] = {}
        self._num_users: dict[int, int] = {}
        # Pages nobody holds, least recently used first; one always stands behind its children.
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that can be had now: free ones, and cached ones nobody holds."""
        return self._pool.num_free + len(self._unused)

    @property
    def num_cached(self) -> int:
        """Pages the cache owns."""
        return len(self._pages)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages, from the least recently used where no more are free."""
        while self._pool.num_free < count:
            self._evict()
        return self._pool.allocate(count)

    def match(self, namespace: Hashable, tokens: np.ndarray, max_tokens: int) -> Match:
        """Finds the longest cached beginning of at most `max_tokens`, in full pages."""
        prefix: Prefix = (self._num_flushes, namespace)
        text, pages, num_unused = tokens.tobytes(), [], 0
        for index in range(max_tokens // self._page_size):
            page = self._pages.get((prefix, self._tokens_of(text, index)))
            if page is None:
                break
            pages.append(page)
            num_unused += not self._num_users[page]
            prefix = page
        return Match(prefix, pages, num_unused)

    def next_page(self, prefix: Prefix, tokens: np.ndarray, max_tokens: int) -> Key | None:
        """Key of the page that goes on where a prefix ends; None if it ends after `max_tokens`."""
        start = self._length(prefix) * self._page_size
        end = start + self._page_size
        if not self._is_enabled or end > max_tokens:
            return None
        return prefix, tokens[start:end].tobytes()

    def hold(self, prefix: Prefix) -> None:
        """Keeps a prefix for a new user, until it is released."""
        while isinstance(prefix, int):
            self._use(prefix)
            prefix, _ = self._keys[prefix]

    def extend(
        self, prefix: Prefix, tokens: np.ndarray, pages: list[int], num_tokens: int
    ) -> Prefix:
        """Caches the full pages among the first `num_tokens` of a text, and holds them.

        Args:
          prefix: What is held of it so far.
          tokens: The text.
          pages: Where it stands.
          num_tokens: How much of it is there.

        Returns:
          What is held now; it ends where somebody else has cached a page of the same text first.
        """
        text = tokens.tobytes()
        for index in self._full_pages(prefix, num_tokens):
            key = prefix, self._tokens_of(text, index)
            if key in self._pages:
                break
            prefix = self._insert(key, pages[index])
        return prefix

    def release(
        self, prefix: Prefix, tokens: np.ndarray, pages: list[int], num_tokens: int
    ) -> None:
        """Takes a user's pages back; the full ones among the first `num_tokens` stay cached."""
        text, full = tokens.tobytes(), self._full_pages(prefix, num_tokens)
        freed = []
        for index in full:
            key = prefix, self._tokens_of(text, index)
            cached = self._pages.get(key)
            if cached is None:
                prefix = self._insert(key, pages[index])
            else:
                self._use(cached)
                freed.append(pages[index])
                prefix = cached
        self._pool.free(freed + pages[max(full.start, full.stop) :])
        while isinstance(prefix, int):
            self._num_users[prefix] -= 1
            if not self._num_users[prefix]:
                self._unused[prefix] = None
            prefix, _ = self._keys[prefix]

    def flush(self) -> None:
        """Forgets all; pages in use serve their users on, and nobody else."""
        self._num_flushes += 1
        while self._unused:
            self._evict()

    def check_integrity(self, users: list[tuple[Prefix, list[int]]]) -> None:
        """Asserts that pages have one owner each, and that users are counted right."""
        assert self._pages == {key: page for page, key in self._keys.items()}, "a key is lost"
        owned, num_users = [*self._keys], dict.fromkeys(self._keys, 0)
        for prefix, pages in users:
            owned += pages[self._length(prefix) :]
            while isinstance(prefix, int):
                assert pages[self._num_pages[prefix] - 1] == prefix, "a page is not the one held"
                num_users[prefix] += 1
                prefix, _ = self._keys[prefix]
        self._pool.check_integrity([owned])
        assert num_users == self._num_users
        assert {page for page, count in num_users.items() if not count} == {*self._unused}
        assert num_users.keys() == self._num_pages.keys()

    def _length(self, prefix: Prefix) -> int:
        """Its pages."""
        return self._num_pages[prefix] if isinstance(prefix, int) else 0

    def _full_pages(self, prefix: Prefix, num_tokens: int) -> range:
        """Indices of the full pages after a prefix, as far as they may be cached."""
        end = num_tokens // self._page_size if self._is_enabled else 0
        return range(self._length(prefix), end)

    def _insert(self, key: Key, page: int) -> int:
        self._pages[key] = page
        self._keys[page] = key
        self._num_pages[page] = self._length(key[0]) + 1
        self._num_users[page] = 1
        return page

    def _tokens_of(self, text: bytes, index: int) -> bytes:
        size = TOKEN_BYTES * self._page_size
        return text[index * size : (index + 1) * size]

    def _use(self, page: int) -> None:
        if not self._num_users[page]:
            del self._unused[page]
        self._num_users[page] += 1

    def _evict(self) -> None:
        page, _ = self._unused.popitem(last=False)
        del self._pages[self._keys.pop(page)], self._num_pages[page], self._num_users[page]
        self._pool.free([page])
