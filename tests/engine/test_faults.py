"""Failures at random places: nobody waits for ever, and the engine answers the next request."""

import copy
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxengine.errors import JaxEngineError, SamplerError, StepError
from jaxengine.runtime import runner as runner_module
from jaxengine.runtime.runner import StepHandle
from tests.engine import tiny
from tests.engine.conftest import assert_idle

PARAMS = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPTS = tiny.prompts_of(5, 40, 9, 70, 18, 3, 50, 33, seed=6)


class Fault(RuntimeError):
    """A failure a test asked for."""


def now_and_then(function: Callable[..., Any], rng: random.Random, error: Exception) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if rng.random() < 0.2:
            raise copy.copy(error)
        return function(*args, **kwargs)

    return wrapper


@contextmanager
def faults(engine: Any, where: str, seed: int) -> Iterator[None]:
    rng = random.Random(seed)
    oom = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
    with pytest.MonkeyPatch.context() as patch:
        if where in ("dispatch", "memory"):
            error = oom if where == "memory" else Fault("at dispatch")
            dispatch = now_and_then(engine._runner.dispatch, rng, error)
            patch.setattr(engine._runner, "dispatch", dispatch)
        if where == "read":
            result = now_and_then(StepHandle.result, rng, Fault("at read-back"))
            patch.setattr(StepHandle, "result", result)
        if where == "memory":
            patch.setattr(runner_module, "_zeros", now_and_then(runner_module._zeros, rng, oom))
        yield


@pytest.mark.parametrize("where", ["dispatch", "read", "memory"])
def test_failures_at_random_steps_leave_nobody_waiting(engine: Any, where: str):
    """Callers of all kinds; each output is whole and right, or says what failed."""

    def whole(i: int) -> list[Any]:
        prompts = [PROMPTS[i], PROMPTS[-i]]
        outputs = engine.generate(input_ids=prompts, sampling_params=PARAMS, on_error="return")
        return list(zip(prompts, outputs, strict=True))

    def raising(i: int) -> list[Any]:
        try:
            output = engine.generate(input_ids=PROMPTS[i], sampling_params=PARAMS)
        except StepError as error:
            return [(PROMPTS[i], {"error": {"message": str(error)}})]
        return [(PROMPTS[i], output)]

    def streamed(i: int) -> list[Any]:
        ids: list[int] = []
        try:
            for chunk in engine.generate(input_ids=PROMPTS[i], sampling_params=PARAMS, stream=True):
                ids += chunk["delta_ids"]
                assert ids == chunk["output_ids"]
        except StepError as error:
            assert not ids or tiny.assert_greedy(PROMPTS[i], ids) is None
            return [(PROMPTS[i], {"error": {"message": str(error)}})]
        return [(PROMPTS[i], {"output_ids": ids})]

    kinds = [whole, raising, streamed]
    num_failed = 0
    with faults(engine, where, seed=1), ThreadPoolExecutor(6) as pool:
        calls = [pool.submit(kinds[i % 3], i % 8) for i in range(18)]
        for call in calls:
            for prompt, output in call.result(timeout=60):
                if "error" in output:
                    num_failed += 1
                    message = output["error"]["message"]
                    assert "KV pages" in message and ("Fault" in message or "RESOURCE" in message)
                else:
                    assert len(output["output_ids"]) == 24
                    tiny.assert_greedy(prompt, output["output_ids"])
    assert num_failed > 0
    assert_idle(engine)
    output = engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS)
    tiny.assert_greedy(PROMPTS[0], output["output_ids"])


def test_failed_step_says_how_much_memory_its_pages_take(
    engine: Any, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            engine._runner,
            "dispatch",
            now_and_then(engine._runner.dispatch, _Always(), Fault("burnt")),
        )
        with pytest.raises(StepError) as caught:
            engine.generate(input_ids=PROMPTS[0], sampling_params=PARAMS)
    # 16 tokens x 2 layers x 2 heads of 16 x keys and values in float32: 8,192 bytes a page.
    assert "14 KV pages (0.1 MB) of 15 KV pages (0.1 MB) were free" in str(caught.value)
    assert isinstance(caught.value.__cause__, Fault)


class _Always(random.Random):
    def random(self) -> float:
        return 0.0


# A user's sampler


def test_sampler_that_cannot_be_traced_fails_its_call_alone(engine: Any):
    def sampler(logits: Any, ctx: Any) -> Any:
        raise ZeroDivisionError("a bug of the user's")

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(engine.generate, None, PARAMS, PROMPTS[0])
        with pytest.raises((SamplerError, ZeroDivisionError), match="a bug of the user's"):
            engine.generate(input_ids=PROMPTS[1], sampling_params=PARAMS, sampler=sampler)
        tiny.assert_greedy(PROMPTS[0], other.result(20)["output_ids"])
    assert_idle(engine)


def test_sampler_that_fails_as_it_runs_fails_its_step(engine: Any):
    is_bad = threading.Event()

    def on_host(tokens: Any) -> Any:
        if is_bad.is_set():
            raise ZeroDivisionError("a bug of the user's")
        return tokens

    def sampler(logits: Any, ctx: Any) -> Any:
        tokens = jnp.argmax(logits, -1).astype(jnp.int32)
        return jax.pure_callback(on_host, jax.ShapeDtypeStruct(tokens.shape, jnp.int32), tokens)

    asked = {"input_ids": PROMPTS[2], "sampling_params": PARAMS, "sampler": sampler}
    tiny.assert_greedy(PROMPTS[2], engine.generate(**asked)["output_ids"])
    is_bad.set()
    with pytest.raises(JaxEngineError, match="a bug of the user's"):
        engine.generate(**asked)
    is_bad.clear()
    tiny.assert_greedy(PROMPTS[2], engine.generate(**asked)["output_ids"])
    assert_idle(engine)
