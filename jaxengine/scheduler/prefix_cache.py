"""KV pages kept for texts that begin alike. Owns page ids and tokens; knows nothing of sequences.

A hash chain: a full page is found by the page before it and by its own tokens, so equal prefixes
find the same pages. What a page holds depends on all tokens before it, and on nothing else.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxengine.scheduler.page_pool import PagePool


class Root(NamedTuple):
    """Where the texts of a namespace begin; none is found any more after the next flush."""

    num_flushes: int
    namespace: Hashable


@dataclass(eq=False)
class CachedPage:
    """A full page. It is never written again.

    Attributes:
      parent: What stands before it.
      tokens: Its own tokens, as bytes.
      page: Page id.
      num_pages: Pages of the text up to here, itself included.
      num_users: Members that hold it; those of a page hold its parent, too.
    """

    parent: "Prefix"
    tokens: bytes
    page: int
    num_pages: int
    num_users: int = 0


type Prefix = Root | CachedPage


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

    Every page taken has one owner: a member, or the cache.
    """

    def __init__(self, pool: PagePool, page_size: int, *, is_enabled: bool = True) -> None:
        self._pool = pool
        self._page_size = page_size
        self._is_enabled = is_enabled
        self._num_flushes = 0
        self._pages: dict[tuple[Prefix, bytes], CachedPage] = {}
        # Pages nobody holds, least recently used first; one always stands behind its children.
        self._unused: OrderedDict[CachedPage, None] = OrderedDict()

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
        prefix: Prefix = Root(self._num_flushes, namespace)
        pages, num_unused = [], 0
        for index in range(max_tokens // self._page_size):
            cached = self._pages.get((prefix, self._tokens_of(tokens, index)))
            if cached is None:
                break
            pages.append(cached.page)
            num_unused += not cached.num_users
            prefix = cached
        return Match(prefix, pages, num_unused)

    def next_page(
        self, prefix: Prefix, tokens: np.ndarray, max_tokens: int
    ) -> tuple[Prefix, bytes] | None:
        """Key of the page that goes on where a prefix ends; None if it ends after `max_tokens`."""
        index = _num_pages(prefix)
        if not self._is_enabled or (index + 1) * self._page_size > max_tokens:
            return None
        return prefix, self._tokens_of(tokens, index)

    def hold(self, prefix: Prefix) -> None:
        """Keeps a prefix for a new user, until it is released."""
        while isinstance(prefix, CachedPage):
            self._use(prefix)
            prefix = prefix.parent

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
        for index in self._full_pages(prefix, num_tokens):
            key = prefix, self._tokens_of(tokens, index)
            if key in self._pages:
                break
            prefix = self._insert(key, pages[index])
        return prefix

    def release(
        self, prefix: Prefix, tokens: np.ndarray, pages: list[int], num_tokens: int
    ) -> None:
        """Takes a user's pages back; the full ones among the first `num_tokens` stay cached."""
        own = pages[_num_pages(prefix) :]
        for index in self._full_pages(prefix, num_tokens):
            key = prefix, self._tokens_of(tokens, index)
            if key in self._pages:
                prefix = self._pages[key]
                self._use(prefix)
            else:
                prefix = self._insert(key, pages[index])
                own.remove(pages[index])
        self._pool.free(own)
        while isinstance(prefix, CachedPage):
            prefix.num_users -= 1
            if not prefix.num_users:
                self._unused[prefix] = None
            prefix = prefix.parent

    def flush(self) -> None:
        """Forgets all; pages in use serve their users on, and nobody else."""
        self._num_flushes += 1
        while self._unused:
            self._evict()

    def check_integrity(self, users: list[tuple[Prefix, list[int]]]) -> None:
        """Asserts that pages have one owner each, and that users are counted right."""
        owned = [cached.page for cached in self._pages.values()]
        num_users = dict.fromkeys(self._pages.values(), 0)
        for prefix, pages in users:
            owned += pages[_num_pages(prefix) :]
            while isinstance(prefix, CachedPage):
                assert pages[prefix.num_pages - 1] == prefix.page, "a page is not the one held"
                num_users[prefix] += 1
                prefix = prefix.parent
        self._pool.check_integrity([owned])
        assert all(cached.num_users == count for cached, count in num_users.items())
        assert {cached for cached, count in num_users.items() if not count} == {*self._unused}

    def _full_pages(self, prefix: Prefix, num_tokens: int) -> range:
        """Indices of the full pages after a prefix, as far as they may be cached."""
        end = num_tokens // self._page_size if self._is_enabled else 0
        return range(_num_pages(prefix), end)

    def _insert(self, key: tuple[Prefix, bytes], page: int) -> CachedPage:
        cached = CachedPage(*key, page, _num_pages(key[0]) + 1, num_users=1)
        self._pages[key] = cached
        return cached

    def _tokens_of(self, tokens: np.ndarray, index: int) -> bytes:
        return tokens[index * self._page_size : (index + 1) * self._page_size].tobytes()

    def _use(self, cached: CachedPage) -> None:
        if not cached.num_users:
            del self._unused[cached]
        cached.num_users += 1

    def _evict(self) -> None:
        cached, _ = self._unused.popitem(last=False)
        del self._pages[cached.parent, cached.tokens]
        self._pool.free([cached.page])


def _num_pages(prefix: Prefix) -> int:
    return prefix.num_pages if isinstance(prefix, CachedPage) else 0
