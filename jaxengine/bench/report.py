"""README's table of measured numbers and its plot, from the result files: none is typed by hand.

The newest correct row of every workload counts, for each GPU; older files stay, named by commit.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxengine.bench.workloads import STARTUP, WORKLOADS

type Row = Mapping[str, Any]

RESULTS = Path(__file__).parent / "results"
PLOT = RESULTS / "batch_size.svg"
SPEEDUPS = RESULTS / "speedups.svg"
BEGIN = "<!-- begin: python -m jaxengine.bench report -->"
END = "<!-- end: python -m jaxengine.bench report -->"
"""README's section between these lines is generated."""

STARTS = {
    "cold_second_token": "process start to the second token, caches empty",
    "cold_all_ready": "process start to all programs ready, caches empty",
    "warm_second_token": "the same to the second token, second start on the machine",
    "warm_all_ready": "the same to all programs ready, second start on the machine",
}
"""Rows of W5, by metric."""


class Peers(NamedTuple):
    """What others need for the same on the same GPU.

    Attributes:
      source: How it was measured.
      gpu: Where.
      values: Name and version -> workload -> value, in the workload's unit.
    """

    source: str
    gpu: str
    values: Mapping[str, Mapping[str, float]]


def read_rows(folder: Path = RESULTS) -> list[Row]:
    """Every row of every result file, the oldest first."""
    lines = itertools.chain.from_iterable(
        file.read_text().splitlines() for file in sorted(folder.glob("*.jsonl"))
    )
    return sorted(map(json.loads, lines), key=lambda row: row["environment"]["time"])


def read_peers(folder: Path = RESULTS) -> Peers:
    """The peers' figures."""
    raw = json.loads((folder / "peers.json").read_text())
    return Peers(raw["source"], raw["gpu"], raw["peers"])


def newest(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """GPU -> workload (W5: "w5/" and the metric) -> its newest correct row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        gpu = row["environment"].get("gpu")
        if gpu and row["is_correct"] and not row["workload"].startswith("cpu_"):
            found.setdefault(gpu, {})[key_of(row)] = row
    return found


def key_of(row: Row) -> str:
    """What a row is a result of."""
    return f"{STARTUP}/{row['metric']}" if row["workload"] == STARTUP else row["workload"]


def section(rows: Sequence[Row], peers: Peers) -> str:
    """The generated part of README, markers included."""
    parts = [BEGIN]
    for gpu, by_key in newest(rows).items():
        parts += [_setting(gpu, by_key.values()), "\n".join(_table(gpu, by_key, peers))]
        if gpu == peers.gpu:
            parts.append(f"Peers: {peers.source}")
            parts.append(f"![speed beside the peers]({SPEEDUPS.relative_to(RESULTS.parents[2])})")
        if sweep(by_key):
            parts.append(
                f"![decode over batch size]({PLOT.relative_to(RESULTS.parents[2])})\n\n"
                "Decode steps alone, 128 tokens in; the peers' points are their single stream and "
                "their 256 x (128 in, 256 out), prefill included."
            )
    on_cpu = [r for r in rows if r["workload"].startswith("cpu_") and r["is_correct"]]
    if any("peer" not in row for row in on_cpu):
        parts += [_cpu_setting(on_cpu), "\n".join(_cpu_table(on_cpu))]
    return "\n\n".join([*parts, END])


def replace_section(readme: str, new: str) -> str:
    """README with its generated part renewed.

    Raises:
      ValueError: If the markers are not there.
    """
    start, end = readme.index(BEGIN), readme.index(END) + len(END)
    return readme[:start] + new + readme[end:]


def sweep(by_key: Mapping[str, Row]) -> dict[int, Row]:
    """Rows of the batch-size sweep, by batch size."""
    found = {int(k.removeprefix("sweep_b")): r for k, r in by_key.items() if k[:7] == "sweep_b"}
    return dict(sorted(found.items()))


class Speedup(NamedTuple):
    """A workload beside the first of the peers.

    Attributes:
      title: Of the workload.
      ours: How many times faster than that peer this engine is.
      others: The same of the further peers, by name, where they were measured.
    """

    title: str
    ours: float
    others: Mapping[str, float]


def speedups(by_key: Mapping[str, Row], peers: Peers) -> list[Speedup]:
    """All workloads for which both sides have a number, in the order of the table."""
    first, *further = peers.values
    found = []
    for key, title in _titles():
        base = peers.values[first].get(key)
        if key not in by_key or base is None:
            continue
        is_rate = by_key[key]["unit"] == "tok/s"

        def times(value: float, base: float = base, is_rate: bool = is_rate) -> float:
            return value / base if is_rate else base / value

        others = {n: times(peers.values[n][key]) for n in further if key in peers.values[n]}
        found.append(Speedup(title, times(by_key[key]["value"]), others))
    return found


def floor(row: Row) -> float | None:
    """What a row's value would be at the device's peak; None where that is unknown."""
    share = (row.get("roofline") or {}).get("share_of_floor")
    if not share:
        return None
    return row["value"] / share if row["unit"] == "tok/s" else row["value"] * share


def _setting(gpu: str, rows: Iterable[Row]) -> str:
    """What the numbers of a table stand with."""
    environments = [row["environment"] for row in rows]

    def every(name: str, of: Any) -> str:
        return f"{name} {', '.join(sorted({str(of(e)) for e in environments}))}"

    facts = [
        every("driver", lambda e: e["driver"]),
        every("jax", lambda e: e["versions"]["jax"]),
    ]
    runs = sorted({len(row["runs"]) for row in rows})
    return (
        f"One {gpu}, {', '.join(facts)}; random weights in bfloat16, ids in, all programs ready. "
        f"Median of {' or '.join(map(str, runs))} runs, with the largest minus the smallest. The "
        "floor is reading every weight and key once a step at the measured bandwidth, or computing "
        "at the measured matrix rate, whichever is slower."
    )


def _table(gpu: str, by_key: Mapping[str, Row], peers: Peers) -> Iterator[str]:
    others = peers.values if gpu == peers.gpu else {}
    yield " | ".join(["| workload", "unit", "jaxengine", "spread", "floor", *others, "commit |"])
    yield "|---|---|" + "---:|" * (3 + len(others)) + "---|"
    for key, title in _titles():
        row = by_key.get(key)
        if row is None:
            continue
        cells = [row["value"], row["spread"], floor(row)]
        cells += [values.get(key) for values in others.values()]
        commit = row["environment"]["commit"][:7]
        yield " | ".join([f"| {title}", row["unit"], *map(_number, cells), f"{commit} |"])


def _cpu_setting(rows: Sequence[Row]) -> str:
    ours = [row["environment"] for row in rows if "peer" not in row][-1]
    return (
        f"On {ours['num_cpus']} cores of a CPU ({ours['cpu']}), jax {ours['versions']['jax']}, "
        f"commit {ours['commit'][:7]}; float32, decode steps alone, tok/s."
    )


def _cpu_table(rows: Sequence[Row]) -> Iterator[str]:
    """Ours and others on the same cores; the newest of each."""
    found = {(row.get("peer", "jaxengine"), row["workload"]): row for row in rows}
    names = list(dict.fromkeys(name for name, _ in found))
    names.sort(key=lambda name: name != "jaxengine")
    yield " | ".join(["| workload", *names]) + " |"
    yield "|---|" + "---:|" * len(names)
    for key, workload in WORKLOADS.items():
        cells = [found.get((name, key)) for name in names]
        if any(cells):
            values = [_number(None if cell is None else cell["value"]) for cell in cells]
            yield " | ".join([f"| {workload.title}", *values]) + " |"


def _titles() -> Iterator[tuple[str, str]]:
    """Rows of the table, in order; the sweep is in the plot."""
    for name, workload in WORKLOADS.items():
        if name == "w6_greedy":
            yield from ((f"{STARTUP}/{metric}", title) for metric, title in STARTS.items())
        if not name.startswith(("sweep_", "cpu_")):
            shape = "" if workload.shape == "qwen2.5-0.5b" else f"{workload.shape}: "
            yield name, shape + workload.title


def _number(value: float | None) -> str:
    """Three digits or more.

    >>> [_number(x) for x in (None, 0.9284, 15.74, 56089.4)]
    ['-', '0.928', '15.7', '56,089']
    """
    if value is None:
        return "-"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def main() -> int:
    """Renews README's section, and the plots there are rows for."""
    rows, peers = read_rows(), read_peers()
    readme = RESULTS.parents[2] / "README.md"
    readme.write_text(replace_section(readme.read_text(), section(rows, peers)))
    from jaxengine.bench import plot

    by_key = newest(rows).get(peers.gpu, {})
    plot.draw_speedups(speedups(by_key, peers), next(iter(peers.values)), SPEEDUPS)
    if sweep(by_key):
        plot.draw(by_key, peers, PLOT)
    return 0
