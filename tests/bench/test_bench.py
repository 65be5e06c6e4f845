"""The bench command on a tiny model: every field of a result, and that its checks can fail."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest

from jaxengine.bench import startup
from jaxengine.bench.__main__ import main, parse
from jaxengine.bench.calls import Call, mixed
from jaxengine.bench.checks import check_outputs
from jaxengine.bench.environment import KernelLog
from jaxengine.bench.roofline import Lengths, Peaks, Roofline, Work, compare
from jaxengine.bench.shapes import SHAPES
from jaxengine.bench.workloads import SAMPLING_VARIANTS, WORKLOADS
from jaxengine.models.qwen2 import parse_config
from pallas_kernels import dispatch

# The first test waits for an engine, and for all that it is asked to measure.
pytestmark = pytest.mark.timeout(400)

# One page a sequence and one bucket of each kind: as few programs as there can be.
SMALL = ["--shape", "tiny", "--scale", "0.015"]
for setting in (
    "max_running_requests=4",
    "decode_buckets=[4]",
    "prefill_buckets=[32]",
    "chunked_prefill_size=32",
    "page_size=32",
    "context_length=32",
):
    SMALL += ["--set", setting]

FIELDS = """
agreement checks counters dtype environment host_seconds is_correct kernels mean_window_steps median
metric num_windows profile roofline runs scale settings shape spread startup title unit value
warmup_s workload
"""


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def too_long(scale: float, vocab_size: int) -> list[Call]:
    return [Call([[1] * 100], [{"max_new_tokens": 2}])]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("bench") / "results.jsonl"
    bad = dataclasses.replace(WORKLOADS["w1"], calls=too_long)
    command = ["w1", "bad", "w2", "w4", "w6_custom", "w6_hidden_states", *SMALL]
    command += ["--runs", "2", "--out", str(out)]
    dispatch._log_once.cache_clear()  # another test's engine may have said it in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORKLOADS, "bad", bad)
        assert main([*command, "--commit", "abc", "--peak-bytes-per-s", "1e10"]) == 1
    return {result["workload"]: result for result in read(out)}


@pytest.fixture
def good(results: dict[str, dict]) -> dict[str, dict]:
    return {name: result for name, result in results.items() if name != "bad"}


def test_results_come_in_order_with_every_field(good: dict[str, dict]):
    assert list(good) == ["w1", "w2", "w4_p32", "w4_p1024", "w6_custom", "w6_hidden_states"]
    for result in good.values():
        assert set(result) == set(FIELDS.split())
        assert len(result["runs"]) == 2
        assert min(result["runs"]) <= result["value"] == result["median"] <= max(result["runs"])
        assert result["environment"]["commit"] == "abc"
        assert result["environment"]["platform"] == "cpu"
        assert {"jax", "jaxlib"} <= set(result["environment"]["versions"])
        assert result["settings"]["decode_buckets"] == [4] and result["dtype"] == "float32"
        assert result["kernels"]["paged_decode_attention"] == "reference"
        assert result["startup"]["programs"]["num_compiled"] > 0


def test_checks_hold_and_are_those_of_the_workload(good: dict[str, dict]):
    everywhere = {"lengths", "ids_in_vocabulary", "nothing_cached", "alone_as_in_batch"}
    everywhere |= {"logprobs_as_plain", "decided_tokens_as_plain", "tokens_pass_filters"}
    everywhere |= {"plain_path_ran"}
    single = everywhere | {"replays_identical", "calls_agree"}
    assert set(good["w1"]["checks"]) == set(good["w4_p32"]["checks"]) == single
    assert set(good["w2"]["checks"]) == everywhere
    assert set(good["w6_hidden_states"]["checks"]) == everywhere | {"hidden_states"}
    assert all(result["is_correct"] for result in good.values())


def test_counters_and_roofline_are_of_one_pass(good: dict[str, dict]):
    assert [good[name]["metric"] for name in ("w1", "w2", "w4_p32")] == [
        "time_per_token",
        "output_tokens_per_s",
        "time_to_second_token",
    ]
    assert good["w1"]["counters"]["num_generated_tokens"] == 9
    assert good["w1"]["roofline"]["num_steps"] == good["w1"]["roofline"]["min_steps"] == 7
    assert good["w4_p32"]["roofline"]["num_steps"] == 1
    # W1 subtracts two times, and so few tokens may come out below zero.
    for result in (result for name, result in good.items() if name != "w1"):
        assert result["roofline"]["peak_bytes_per_s"] == 1e10 and min(result["runs"]) > 0
        assert 0 < result["roofline"]["share_of_floor"] <= result["roofline"]["share_of_peak_bytes"]


def test_a_failing_workload_is_a_result_and_the_others_go_on(results: dict[str, dict]):
    assert list(results)[1] == "bad"
    assert results["bad"]["error"].startswith("PromptTooLongError: Prompt 0 has 100 tokens")
    assert not results["bad"]["is_correct"]


def test_mixed_workload_is_the_published_recipe():
    (call,) = mixed(1.0, 151936)
    lengths = [len(ids) for ids in call.input_ids]
    assert call.num_output_tokens == 133_966
    assert len(lengths) == 256 and 100 <= min(lengths) and max(lengths) <= 1024


def test_workloads_are_the_same_whenever_they_are_made():
    for name, workload in WORKLOADS.items():
        first, again = (workload.calls(0.05, 1000)[-1] for _ in range(2))
        assert max(map(max, first.input_ids)) < 1000
        assert first[:2] == again[:2], f"{name} differs when made again"
    (call,) = WORKLOADS["w3"].calls(1.0, 1000)
    assert (len(call.input_ids), len(call.input_ids[0])) == (2048, 512)
    assert call.num_output_tokens == 2048 * 256


def test_names_expand_in_order_and_unknown_ones_are_refused(capsys: pytest.CaptureFixture[str]):
    names, options = parse(["w2", "w6", "--set", "a=[1,2]", "--set", "b=text"])
    assert names == ["w2", *(f"w6_{variant}" for variant in SAMPLING_VARIANTS)]
    assert options.settings == {"a": [1, 2], "b": "text"}
    with pytest.raises(SystemExit):
        parse(["w6_top"])
    assert "did you mean w6_top_p?" in capsys.readouterr().err


def output(ids: list[int], **meta: object) -> dict:
    reason = {"type": "length", "length": len(ids)}
    return {"output_ids": ids, "meta_info": {"finish_reason": reason, "cached_tokens": 0, **meta}}


@pytest.mark.parametrize(
    "wrong, check",
    [
        (output([1]), "lengths"),
        (output([1, 2], finish_reason={"type": "abort"}), "lengths"),
        (output([1, 10]), "ids_in_vocabulary"),
        (output([1, -2]), "ids_in_vocabulary"),
        (output([1, 2], cached_tokens=1), "nothing_cached"),
        (output([1, 2], output_token_logprobs=[(float("nan"), 1, None)] * 2), "logprobs"),
        (output([1, 2], output_token_logprobs=[(-1.0, 1, None)]), "logprobs"),
        (output([1, 2], output_top_logprobs=[[(-1.0, 1, None)]] * 2), "top_logprobs"),
        (output([1, 2], hidden_states=np.ones((4, 4))), "hidden_states"),
        (output([1, 2], hidden_states=np.zeros((3, 4))), "hidden_states"),
    ],
)
def test_checks_notice(wrong: dict, check: str):
    asked = {
        "logprobs": {"return_logprob": True},
        "top_logprobs": {"top_logprobs_num": 2},
        "hidden_states": {"return_hidden_states": True},
    }
    call = Call([[1]], [{"max_new_tokens": 2}], asked.get(check, {}))
    assert [name for name, good in check_outputs(call, [wrong], 10).items() if not good] == [check]


def test_kernel_log_tells_a_fallback():
    log = KernelLog()
    try:
        logging.getLogger("pallas_kernels").info("a: triton")
        assert log.backends() == {"a": "triton"} and not log.has_fallback()
        logging.getLogger("pallas_kernels").warning("a: reference, not triton: odd shape")
        assert log.has_fallback()
        assert log.backends()["a"] == "reference, not triton: odd shape | triton"
    finally:
        log.close()


def test_roofline_agrees_with_counting_by_hand():
    model = parse_config(SHAPES["qwen2.5-0.5b"])
    roofline = Roofline(model, "bfloat16", [Lengths(2, 3), Lengths(1, 2)])
    weights = 24 * (896 * 1152 + 896 * 896 + 3 * 896 * 4864) + 151936 * 896
    assert roofline.weight_bytes == 2 * weights
    assert roofline.min_steps(num_slots=2) == 2 and roofline.min_steps(num_slots=1) == 3
    # Decode steps attend to 3 and 4 tokens of the first request and to 2 of the second.
    work = roofline.decode(2)
    assert work.num_bytes == 4 * weights + (3 + 4 + 2 + 3) * 12288
    assert work.num_flops == 2 * weights * 3 + 4 * 896 * 24 * 9
    assert roofline.prefill(1).num_bytes == 2 * weights + 2 * 3 * 12288


def test_floor_is_the_slower_of_memory_and_compute():
    rows = compare([Work(8.0, 8.0)], [Work(4.0, 6.0)], 12.0, Peaks(2.0, 1.0))
    assert rows["floor_s"] == 6.0 and rows["share_of_floor"] == 0.5
    assert rows["share_of_peak_bytes"] == pytest.approx(1 / 3)
    assert compare([Work(1, 1)], [Work(1, 1)], 1.0, Peaks(None, None))["share_of_floor"] is None


@pytest.mark.nightly
def test_startup_measures_processes_with_empty_and_full_caches(tmp_path: Path):
    out = tmp_path / "results.jsonl"
    assert main([startup.STARTUP, *SMALL, "--runs", "1", "--out", str(out)]) == 0
    rows = {row["metric"]: row for row in read(out)}
    assert list(rows) == [
        "cold_second_token",
        "warm_second_token",
        "cold_all_ready",
        "warm_all_ready",
    ]
    assert all(row["is_correct"] for row in rows.values())
    assert rows["warm_all_ready"]["value"] < rows["cold_all_ready"]["value"]
    assert list(rows["cold_all_ready"]["split"][0]) == list(startup.EVENTS)
