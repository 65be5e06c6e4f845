"""Engines that many tests share; all compile into one executable cache."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import jaxengine
from tests.conftest import compiled
from tests.engine import tiny

SETTINGS = {
    "max_running_requests": 4,
    "decode_buckets": (4,),
    "prefill_buckets": (64,),
    "chunked_prefill_size": 64,
    "context_length": 256,
    "progress": False,
}
"""Few programs: compiling is what these tests take their time for."""

POOL_TOKENS = 240
"""Tokens of the tiny engine's pages: less than its context, and much less than four of them."""


@pytest.fixture(scope="session")
def step_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Windows of a single step, and one page a sequence: the plainest an engine can be."""
    single = {"page_size": 256, "chunked_prefill_size": 256, "prefill_buckets": (256,)}
    return {**settings, **single, "max_window_steps": 1, "max_total_tokens": 1024}


@pytest.fixture(scope="session")
def step_engine(step_settings: dict[str, Any], tokenizer: Any) -> Iterator[jaxengine.Engine]:
    """The tiny model with the host looking at every token."""
    model = tiny.engine_arguments()
    with compiled(**model, tokenizer=tokenizer, **step_settings) as engine:
        yield engine
        assert_idle(engine)


POISON = 300
"""A token whose embedding is NaN in the `poisoned_engine`."""


@pytest.fixture(scope="session")
def poisoned_engine(settings: dict[str, Any], tokenizer: Any) -> Iterator[jaxengine.Engine]:
    """The tiny model with one bad token: only requests that hold it fail."""
    embedding = tiny.TENSORS["model.embed_tokens.weight"].copy()
    embedding[POISON] = np.nan
    model = tiny.engine_arguments({**tiny.TENSORS, "model.embed_tokens.weight": embedding})
    with jaxengine.Engine(**model, tokenizer=tokenizer, **settings) as engine:
        yield engine
        assert_idle(engine)


@pytest.fixture
def arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """For an engine over the tiny model that only the test itself holds."""
    return {**tiny.engine_arguments(), **settings}


@pytest.fixture
def make_engine(settings: dict[str, Any]) -> Iterator[Callable[..., jaxengine.Engine]]:
    """Makes engines of a test's own, over the tiny model unless it says otherwise."""
    engines = []

    def make(**changes: Any) -> jaxengine.Engine:
        model = {} if "model_path" in changes else tiny.engine_arguments()
        engines.append(jaxengine.Engine(**{**model, **settings, **changes}))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def assert_idle(engine: Any) -> None:
    """Nothing runs and no page is held, now or soon: who leaves early is stopped a window later."""
    held = ("num_waiting", "num_running", "num_used_pages")

    def counts() -> dict[str, int]:
        stats = engine.stats()
        num_pages = engine.config.max_total_tokens // engine.config.page_size
        used = {"num_used_pages": num_pages - stats["num_free_pages"]}
        return {name: (stats | used)[name] for name in held}

    wait_for(lambda: not any(counts().values()))
    assert counts() == dict.fromkeys(held, 0)
