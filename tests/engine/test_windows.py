"""Windows as the caller sees them: who ends first, how often the host is asked, what compiles."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest

from tests.engine import tiny

[PROMPT] = tiny.prompts_of(6)


def counts(engine: Any) -> dict[str, float]:
    stats = engine.stats()
    return {k: v for k, v in stats.items() if k.startswith("num_")}


def test_short_request_submitted_while_a_long_one_decodes_finishes_first(engine: Any):
    long = engine.generate(
        input_ids=PROMPT, sampling_params={"max_new_tokens": 200, "ignore_eos": True}, stream=True
    )
    ended = threading.Event()
    started = threading.Event()

    def read_long() -> None:
        for _ in long:
            started.set()
        ended.set()

    reader = threading.Thread(target=read_long)
    reader.start()
    started.wait()
    short = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 4})
    assert not ended.is_set()
    assert short["meta_info"]["completion_tokens"] > 0
    reader.join()


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize("count", [40, 100])
def test_single_stream_takes_windows_of_8_and_more_with_one_read_each(
    engine: Any, is_streaming: bool, count: int
):
    before = counts(engine)
    params = {"max_new_tokens": count, "ignore_eos": True}
    output = engine.generate(input_ids=PROMPT, sampling_params=params, stream=is_streaming)
    assert not is_streaming or len(list(output)) > 1
    now = counts(engine)
    grown = {name: now[name] - value for name, value in before.items()}
    assert grown["num_prefills"] == 1
    assert grown["num_window_steps"] / grown["num_windows"] >= 8
    assert grown["num_host_reads"] == grown["num_windows"] + grown["num_prefills"]
    assert grown["num_generated_tokens"] == count


def test_mean_window_steps_is_in_the_stats(make_engine: Any):
    engine = make_engine()
    engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 100, "ignore_eos": True})
    stats = engine.stats()
    assert stats["mean_window_steps"] >= 8
    assert stats["num_host_reads"] == stats["num_windows"] + stats["num_prefills"]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Events of tracing, lowering and compiling, as they come."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations_are_noticed():
    with compilations() as events:
        jax.jit(lambda x: x + 1)(jax.numpy.ones(3))
    assert {event.split("/")[-1] for event in events} >= {
        "jaxpr_trace_duration",
        "jaxpr_to_mlir_module_duration",
        "backend_compile_duration",
    }


VARIANTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.3},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 9, "top_p": 0.7, "min_p": 0.02, "temperature": 1.9},
    {"frequency_penalty": 0.4},
    {"presence_penalty": -0.4},
    {"repetition_penalty": 1.3},
    {"min_new_tokens": 3},
    {"logit_bias": {5: 1.0}},
    {"logit_bias": {i: float(i) for i in range(200)}, "temperature": 0},
    {"stop": ["x", "yz"]},
    {"stop_token_ids": [4, 5, 6, 9]},
    {"ignore_eos": True},
    {"n": 3},
    {"seed": 1},
    {"sampling_seed": 2**62},
    {"skip_special_tokens": False},
    {"no_stop_trim": True, "stop": "e"},
    {"max_new_tokens": 0},
    {"max_new_tokens": 1},
    {"max_new_tokens": None, "ignore_eos": True},
]


def test_nothing_compiles_after_the_start(engine: Any):
    engine.wait_until_compiled()
    with compilations() as events:
        for i, variant in enumerate(VARIANTS):
            params = {"max_new_tokens": 5 + i, **variant}
            prompts = tiny.prompts_of(*range(1, 120, 37 - i), seed=i)
            engine.generate(input_ids=prompts, sampling_params=params, return_logprob=i % 2 == 0)
            list(engine.generate(input_ids=prompts[-1], sampling_params=params, stream=True))
        mixed = [{k: v for k, v in variant.items() if k != "n"} for variant in VARIANTS]
        engine.generate(input_ids=tiny.prompts_of(*range(1, len(mixed) + 1)), sampling_params=mixed)
        engine.generate("the fox", {"max_new_tokens": 3})
        with pytest.raises(ValueError, match="top_p"):
            engine.generate("the fox", {"top_p": 0})
    assert events == []
