"""README says what the result files say; which row of several counts; how a table reads."""

import re
from pathlib import Path

import pytest

from jaxengine.bench import report

README = Path(__file__).parents[2] / "README.md"
PEERS = report.Peers("elsewhere", "G1", {"Other 1.0": {"w1": 2.0}})


def row(workload: str, value: float, time: str, **changes: object) -> dict:
    environment = {
        "gpu": "G1",
        "driver": "580",
        "versions": {"jax": "0.11.2"},
        "commit": f"{workload}-{value}",
        "time": time,
    }
    return {
        "workload": workload,
        "metric": "m",
        "value": value,
        "unit": "ms",
        "spread": 0.1,
        "runs": [value] * 3,
        "roofline": {"share_of_floor": 0.25},
        "is_correct": True,
        "environment": environment | dict(changes.pop("environment", {})),  # type: ignore
    } | changes


def test_readme_is_the_report_of_the_result_files():
    text = README.read_text()
    renewed = report.replace_section(text, report.section(report.read_rows(), report.read_peers()))
    assert text == renewed, "run `python -m jaxengine.bench report`"


def test_every_workload_with_a_peer_is_a_row_of_the_table():
    titles = dict(report._titles())
    for values in report.read_peers().values.values():
        assert values.keys() <= titles.keys()


def test_newest_correct_row_of_each_gpu_counts():
    rows = [
        row("w1", 1.0, "2026-01-01"),
        row("w1", 2.0, "2026-01-02"),
        row("w1", 3.0, "2026-01-03", is_correct=False),
        row("w1", 4.0, "2026-01-04", environment={"gpu": "G2"}),
        row("w1", 5.0, "2026-01-05", environment={"gpu": None}),
    ]
    found = report.newest(rows)
    assert {gpu: by_key["w1"]["value"] for gpu, by_key in found.items()} == {"G1": 2.0, "G2": 4.0}


def test_table_has_floor_spread_and_peers_where_they_were_measured():
    rows = [row("w1", 2.0, "1"), row("w1", 4.0, "1", environment={"gpu": "G2"})]
    text = report.section([*rows, row("w3", 1000.0, "1", unit="tok/s")], PEERS)
    assert "| ms | 2.00 | 0.100 | 0.500 | 2.00 | w1-2.0 |" in text
    assert "| tok/s | 1,000 | 0.100 | 4,000 | - | w3-1000 |" in text
    assert "| ms | 4.00 | 0.100 | 1.00 | w1-4.0 |\n" in text
    assert text.count("elsewhere") == 1


def test_section_is_replaced_and_nothing_else():
    old = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = f"{report.BEGIN}\n\nnew\n\n{report.END}"
    assert report.replace_section(old, new) == f"before\n{new}\nafter\n"
    with pytest.raises(ValueError):
        report.replace_section("before", new)


def test_plot_is_the_same_for_the_same_rows(tmp_path: Path):
    plot = pytest.importorskip("jaxengine.bench.plot")
    pytest.importorskip("matplotlib")
    rows = {f"sweep_b{size}": row(f"sweep_b{size}", 1.0 + size / 64, "1") for size in (1, 64, 512)}
    files = [tmp_path / name for name in ("a.svg", "b.svg")]
    for file in files:
        plot.draw(rows, report.Peers("s", "G1", {"SGLang 1": {"w1": 2.0, "w6_greedy": 9e4}}), file)
    first, second = (file.read_text() for file in files)
    assert first == second
    assert {"jaxengine", "floor", "SGLang 1"} <= set(re.findall(r">([^<>]+)</text>", first))


def test_speedups_are_times_the_first_peer(tmp_path: Path):
    plot = pytest.importorskip("jaxengine.bench.plot")
    pytest.importorskip("matplotlib")
    peers = report.Peers("s", "G1", {"A 1": {"w1": 4.0, "w3": 500.0}, "B 2": {"w3": 250.0}})
    rows = {
        "w1": row("w1", 2.0, "1"),
        "w3": row("w3", 1000.0, "1", unit="tok/s"),
        "w2": row("w2", 9.0, "1", unit="tok/s"),
    }
    found = report.speedups(rows, peers)
    assert [(s.ours, dict(s.others)) for s in found] == [(2.0, {}), (2.0, {"B 2": 0.5})]
    file = tmp_path / "a.svg"
    plot.draw_speedups(found, "A 1", file)
    assert {"jaxengine", "A 1", "B 2", "2.0"} <= set(
        re.findall(r">([^<>]+)</text>", file.read_text())
    )
