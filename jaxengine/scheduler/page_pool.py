"""Free pages of the KV cache. Owns page ids; knows nothing of what stands in them."""

from collections import deque

from jaxengine.types import NULL_PAGE


class PagePool:
    """Hands out page ids and takes them back; page 0, the null page, is never among them."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = deque(page for page in range(num_pages) if page != NULL_PAGE)
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        """Pages that can be had now."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages one sequence could have if it were alone."""
        return self.num_pages - 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages; the caller has checked `num_free`."""
        assert count <= len(self._free), "page pool overdrawn"
        pages = [self._free.popleft() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Gives pages back."""
        foreign = set() if self._used.issuperset(pages) else {*pages} - self._used
        assert not foreign, f"page {min(foreign)} is freed, but nobody holds it"
        self._used.difference_update(pages)
        self._free.extend(pages)

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Asserts that every page has exactly one owner, or is free."""
        held = [page for pages in owned for page in pages]
        assert len(held) == len(set(held)), "a page has two owners"
        assert set(held) == self._used, "a page is leaked or lost"
        assert len(self._free) + len(self._used) == self.capacity, "pages do not add up"
