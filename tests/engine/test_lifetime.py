"""Engines begin and end as Python objects do; no request is left hanging, no thread behind."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import pytest

from jaxengine import Engine
from jaxengine.errors import ConfigError, EngineDeadError
from jaxengine.runtime.executables import ExecutableCache, ProgramSpec
from jaxengine.runtime.program_factory import ProgramFactory
from tests.engine import tiny
from tests.engine.conftest import wait_for

LONG = {"max_new_tokens": None, "ignore_eos": True, "temperature": 0}
SHORT = {"max_new_tokens": 4, "temperature": 0}
[PROMPT] = tiny.prompts_of(6)


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("jaxengine")}


def test_with_block_shuts_down(make_engine: Any):
    before = own_threads()
    with make_engine() as engine:
        assert own_threads() > before
        engine.generate(input_ids=PROMPT, sampling_params=SHORT)
    assert own_threads() == before
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.generate(input_ids=PROMPT, sampling_params=SHORT)


def test_with_block_lets_exceptions_through(make_engine: Any):
    with pytest.raises(ZeroDivisionError), make_engine():
        _ = 1 / 0


def test_shutdown_may_be_called_often_and_at_once(make_engine: Any):
    engine = make_engine()
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(engine.shutdown) for _ in range(4)]:
            future.result(timeout=20)
    engine.shutdown()
    for stream in (False, True):
        with pytest.raises(EngineDeadError, match="shut down"):
            engine.generate(input_ids=PROMPT, sampling_params=SHORT, stream=stream)
    engine.abort("nobody")
    assert engine.stats()["num_running"] == 0


def test_shutdown_frees_the_device_memory(make_engine: Any):
    gc.collect()
    before = len(jax.live_arrays())
    engine = make_engine()
    engine.generate(input_ids=PROMPT, sampling_params=SHORT)
    assert len(jax.live_arrays()) > before
    engine.shutdown()
    assert wait_for(lambda: len(jax.live_arrays()) == before)


def test_shutdown_fails_every_request_and_hangs_none(make_engine: Any):
    engine = make_engine()
    errors: list[BaseException] = []

    def whole() -> None:
        try:
            engine.generate(input_ids=[PROMPT] * 6, sampling_params=LONG)
        except BaseException as error:
            errors.append(error)

    def streamed() -> None:
        try:
            for _ in engine.generate(input_ids=PROMPT, sampling_params=LONG, stream=True):
                pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=f) for f in (whole, streamed) * 3]
    for thread in threads:
        thread.start()
    assert wait_for(lambda: engine.stats()["num_waiting"] > 8)
    engine.shutdown()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [type(error) for error in errors] == [EngineDeadError] * 6


def test_requests_that_race_with_shutdown_end_one_way_or_the_other(make_engine: Any):
    for pause_s in (0.0, 0.002, 0.01):
        engine = make_engine()
        with ThreadPoolExecutor(4) as pool:
            calls = [
                pool.submit(engine.generate, input_ids=PROMPT, sampling_params=SHORT)
                for _ in range(200)
            ]
            time.sleep(pause_s)
            engine.shutdown()
            for call in calls:
                error = call.exception(timeout=20)
                assert error is None or isinstance(error, EngineDeadError)


def test_shutdown_while_programs_compile_fails_those_who_wait_for_them(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
):
    is_asked, is_released = threading.Event(), threading.Event()
    load, first = ExecutableCache.load, ProgramFactory.first

    def load_slowly(self: ExecutableCache, spec: ProgramSpec) -> Any:
        if spec.name == "decode_b4":
            is_asked.set()
            is_released.wait(20)
        return load(self, spec)

    monkeypatch.setattr(ExecutableCache, "load", load_slowly)
    # There is a single size of windows here, and the start would wait for it.
    monkeypatch.setattr(ProgramFactory, "first", lambda self: first(self)[:1])
    engine = make_engine()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(engine.generate, input_ids=PROMPT * 20, sampling_params=LONG)
        assert is_asked.wait(20)
        assert wait_for(lambda: engine.stats()["num_prefills"] == 2)
        threading.Timer(0.3, is_released.set).start()
        engine.shutdown()
        assert isinstance(call.exception(timeout=20), EngineDeadError)


def test_dropped_engine_is_collected_and_its_threads_end(arguments: dict[str, Any]):
    before, arrays = own_threads(), len(jax.live_arrays())
    engine = Engine(**arguments)
    engine.generate(input_ids=PROMPT, sampling_params=SHORT)
    list(engine.generate(input_ids=PROMPT, sampling_params=SHORT, stream=True))
    started = own_threads() - before
    assert len(started) >= 2
    alive = weakref.ref(engine)
    del engine
    assert alive() is None, "something keeps the engine in a reference cycle"
    assert wait_for(lambda: not any(thread.is_alive() for thread in started))
    assert wait_for(lambda: len(jax.live_arrays()) <= arrays)


def test_stream_keeps_its_engine_alive(arguments: dict[str, Any]):
    engine = Engine(**arguments)
    stream = engine.generate(input_ids=PROMPT, sampling_params=SHORT, stream=True)
    del engine
    gc.collect()
    *_, last = stream
    assert len(last["output_ids"]) == 4


def test_engine_may_be_collected_in_its_own_thread(arguments: dict[str, Any]):
    """The garbage collector runs wherever it likes: here in the thread that it has to stop."""
    engine: Any = Engine(**arguments)
    engine.wait_until_compiled()
    engine.itself = engine
    worker, alive = engine._worker, weakref.ref(engine)
    del engine
    gc.disable()
    try:
        # Frozen it would be left out, for it is older than its programs.
        worker.call(lambda: (gc.unfreeze(), gc.collect())).result(timeout=20)
    finally:
        gc.enable()
    assert alive() is None
    assert wait_for(lambda: not any(thread.is_alive() for thread in worker._threads))


def test_full_collection_in_a_call_leaves_out_what_the_start_left(make_engine: Any):
    engine = make_engine()
    engine.wait_until_compiled(background=True)
    engine.generate(input_ids=tiny.prompts_of(*[8] * 40), sampling_params=SHORT)
    # It walks these and stops all threads meanwhile: a third of a second without freezing.
    assert len(gc.get_objects()) < 0.1 * gc.get_freeze_count()


def test_two_engines_live_side_by_side(make_engine: Any):
    one, other = make_engine(), make_engine(**tiny.engine_arguments(tiny.random_tensors(seed=1)))
    with ThreadPoolExecutor(2) as pool:
        params = {**LONG, "max_new_tokens": 60}
        calls = [
            pool.submit(engine.generate, input_ids=PROMPT, sampling_params=params)
            for engine in (one, other)
        ]
        first, second = (call.result()["output_ids"] for call in calls)
    tiny.assert_greedy(PROMPT, first)
    tiny.assert_greedy(PROMPT, second, tensors=tiny.random_tensors(seed=1))
    one.shutdown()
    again = other.generate(input_ids=PROMPT, sampling_params=params)
    assert again["output_ids"] == second


def test_death_of_the_engine_thread_is_told_to_everyone(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
):
    engine = make_engine()
    step = engine._core.step

    def fail_later() -> Any:
        if engine.stats()["num_windows"]:
            raise ZeroDivisionError("a bug of ours")
        return step()

    monkeypatch.setattr(engine._core, "step", fail_later)
    with pytest.raises(EngineDeadError, match="a bug of ours"):
        engine.generate(input_ids=[PROMPT] * 6, sampling_params=LONG)
    with pytest.raises(EngineDeadError):
        engine.generate(input_ids=PROMPT, sampling_params=SHORT)


def test_engine_that_cannot_start_leaves_nothing_behind(make_engine: Any):
    before = own_threads()
    wrong = tiny.engine_arguments()
    wrong["params"]["embed"]["weight"] = wrong["params"]["embed"]["weight"][:-1]
    with pytest.raises(ValueError, match=r"embed\.weight"):
        make_engine(**wrong)
    with pytest.raises(ConfigError, match="page_size"):
        make_engine(page_size=0)
    assert own_threads() == before
