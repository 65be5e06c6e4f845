"""No full collection walks what an engine's start left, and garbage from before does not stay."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from jaxengine.runtime import heap


class Node:
    """May refer to itself."""

    itself: Any = None


def cycle() -> Node:
    node = Node()
    node.itself = node
    return node


@pytest.fixture
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No engine of another test counts; no automatic collection comes in between."""
    monkeypatch.setattr(heap, "_holders", set())
    monkeypatch.setattr(heap, "_unexamined", set())
    gc.unfreeze()
    gc.disable()
    yield
    gc.enable()
    gc.freeze()  # for the engines that still live


def test_garbage_from_before_the_start_is_collected_when_programs_are_there(nobody_else: None):
    garbage = weakref.ref(cycle())
    one = heap.Heap()
    gc.collect()
    assert garbage() is not None, "the start must be short: nothing is walked yet"
    one.settle()
    assert garbage() is None
    one.close()


def test_what_is_there_is_frozen_and_what_comes_later_is_not(nobody_else: None):
    old = cycle()
    one = heap.Heap()
    one.settle()
    num_new = len(gc.get_objects())
    assert num_new < 1000 < gc.get_freeze_count()
    new = weakref.ref(cycle())
    dropped = weakref.ref(old)
    del old
    gc.collect()
    assert new() is None and dropped() is not None
    one.close()
    gc.collect()
    assert dropped() is None


def test_last_of_several_engines_unfreezes(nobody_else: None):
    one, other = heap.Heap(), heap.Heap()
    one.settle()
    one.close()
    one.close()
    one.settle()
    assert gc.get_freeze_count() > 1000
    other.close()
    assert gc.get_freeze_count() == 0
