"""What an engine tells of itself: counts, settings, and a trace of its steps."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine import tiny

PROMPT, OTHER = tiny.prompts_of(40, 9, seed=41)
GREEDY = {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True}


def test_stats_count_tokens_and_windows_and_split_the_time(engine: Any):
    before = engine.stats()
    engine.generate(input_ids=[PROMPT, OTHER], sampling_params=GREEDY)
    engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    after = engine.stats()

    def gained(name: str) -> Any:
        return after[name] - before[name]

    assert gained("num_prompt_tokens") == 89 and gained("num_generated_tokens") == 120
    assert gained("num_windows") == sum(after["window_sizes"].values()) - sum(
        before["window_sizes"].values()
    )
    steps = sum(size * n for size, n in after["window_sizes"].items())
    assert steps == after["num_window_steps"]
    assert after["num_running"] == after["num_waiting"] == 0
    assert 0 < after["cache_hit_rate"] < 1
    assert after["prompt_tokens_per_s"] > 0 and after["generated_tokens_per_s"] > 0
    for part in ("schedule", "dispatch", "wait", "text"):
        assert after["seconds"][part] > before["seconds"][part]


def test_info_has_sglangs_words(engine: Any):
    info = engine.get_server_info()
    assert info["status"] == "ready" and info["page_size"] == 16
    assert info["max_total_num_tokens"] == 240 and info["max_req_input_len"] == 239
    [state] = info["internal_states"]
    assert state["last_gen_throughput"] > 0
    model = engine.get_model_info()
    assert model["is_generation"] and model["weight_version"] == "default"
    assert model["hidden_size"] == 32
    shown = "<Engine of arrays in memory: Qwen2ForCausalLM, float32, 256 tokens of context>"
    assert repr(engine) == shown


def test_a_profile_names_its_steps(engine: Any, tmp_path: Path):
    engine.start_profile(str(tmp_path))
    engine.generate(input_ids=PROMPT, sampling_params=GREEDY)
    path = engine.stop_profile()
    assert Path(path).is_relative_to(tmp_path)
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    steps = {"prefill_t64", "decode_b4_k32"}
    assert steps | {f"read {step}" for step in steps} <= names
    with pytest.raises(RuntimeError, match="No profile is under way"):
        engine.stop_profile()
