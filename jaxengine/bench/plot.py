"""The plots of README: speed beside the peers', decode speed and latency over the batch size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxengine.bench.report import Peers, Row, Speedup, floor, sweep

INK, MUTED, GRID = "#1f2328", "#6e7781", "#d8dee4"
OURS, PEERS = "#0969da", {"SGLang": "#bc4c00", "vLLM": "#8250df"}


def draw_speedups(speedups: Sequence[Speedup], base: str, file: Path) -> None:
    """Draws how many times faster than a peer each workload runs.

    Args:
      speedups: Of the workloads, from top to bottom.
      base: Name of the peer that is 1.
      file: Where to; its suffix says the format.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(10, 0.6 + 0.27 * len(speedups)), layout="constrained")
    places = range(len(speedups))
    # In a line of powers of two twice as fast is as long as half as fast, and 60 times still fits.
    axes.set_xscale("log", base=2)
    lengths = [s.ours - 1 for s in speedups]
    axes.barh(places, lengths, 0.62, left=1, color=OURS, label="jaxengine", zorder=2)
    for place, speedup in zip(places, speedups, strict=True):
        text = f"{speedup.ours:.1f}"
        axes.annotate(
            text, (max(speedup.ours, 1), place), xytext=(4, 0), textcoords="offset points",
            va="center", color=INK, fontsize=8,
        )  # fmt: skip
    for name in dict.fromkeys(name for s in speedups for name in s.others):
        points = [(s.others[name], i) for i, s in enumerate(speedups) if name in s.others]
        colour = PEERS.get(name.split()[0], MUTED)
        axes.scatter(
            *zip(*points, strict=True), s=26, color=colour, marker="D", label=name, zorder=4
        )
    axes.axvline(1, color=PEERS.get(base.split()[0], MUTED), lw=1.4, label=base, zorder=3)
    axes.set_yticks(places, [s.title for s in speedups])
    axes.invert_yaxis()
    axes.set_title(f"times the speed of {base}", loc="left", fontsize=10, color=INK)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.grid(True, axis="x", color=GRID, lw=0.7, zorder=0)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=INK)
    _save(figure, file)


def draw(by_key: Mapping[str, Row], peers: Peers, file: Path) -> None:
    """Draws the sweep beside the floor and the peers' figures.

    Args:
      by_key: Newest rows of the peers' GPU.
      peers: Their figures at batch 1 (W1) and 256 (W6, prefill included).
      file: Where to; its suffix says the format.
    """
    plt = _pyplot()
    rows = sweep(by_key)
    sizes, steps = list(rows), [row["value"] for row in rows.values()]
    floors = [floor(row) for row in rows.values()]
    figure, (rate, latency) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    _curve(rate, sizes, [1e3 * b / ms for b, ms in zip(sizes, steps, strict=True)], OURS)
    _curve(latency, sizes, steps, OURS)
    if all(floors):
        _floor(rate, sizes, [1e3 * b / ms for b, ms in zip(sizes, floors, strict=True) if ms])
        _floor(latency, sizes, floors)
    for name, values in peers.values.items():
        colour = PEERS.get(name.split()[0], MUTED)
        points = {1: values.get("w1")}
        if values.get("w6_greedy"):
            points[256] = 256e3 / values["w6_greedy"]
        known = {size: ms for size, ms in points.items() if ms}
        style = {"s": 46, "color": colour, "label": name, "zorder": 4, "marker": "D"}
        rate.scatter(list(known), [1e3 * b / ms for b, ms in known.items()], **style)
        latency.scatter(list(known), list(known.values()), **style)
    _dress(rate, "decode throughput, tokens per second", is_log=True)
    _dress(latency, "time per step, ms", is_log=False)
    environment = next(iter(rows.values()))["environment"]
    figure.suptitle(
        f"Qwen2.5-0.5B shape, bfloat16, greedy, one {environment['gpu']}, "
        f"jax {environment['versions']['jax']}, commit {environment['commit'][:7]}",
        fontsize=10,
        color=INK,
    )
    _save(figure, file)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same rows give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "jaxengine"})
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
    _pyplot().close(figure)


def _curve(axes: Any, sizes: list[int], values: list[float], colour: str) -> None:
    axes.plot(sizes, values, color=colour, marker="o", lw=2, ms=5, label="jaxengine", zorder=3)
    for i in (0, len(sizes) - 1):
        text = f"{values[i]:,.2f}" if values[i] < 100 else f"{values[i]:,.0f}"
        axes.annotate(
            text,
            (sizes[i], values[i]),
            textcoords="offset points",
            xytext=(0, 9) if i == 0 else (-6, 8),
            ha="center" if i == 0 else "right",
            color=colour,
            fontsize=9,
        )


def _floor(axes: Any, sizes: list[int], values: list[float | None]) -> None:
    style = {"color": MUTED, "lw": 1.4, "ls": (0, (4, 3)), "label": "floor", "zorder": 2}
    axes.plot(sizes, values, **style)


def _dress(axes: Any, title: str, *, is_log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    if is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda y, _: f"{y:,.3g}" if y < 100 else f"{y:,.0f}")
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks([1, 4, 16, 64, 256, 512])
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("batch size", fontsize=9, color=INK)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.grid(True, which="major", color=GRID, lw=0.7, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.legend(frameon=False, fontsize=9, loc="upper left", labelcolor=INK)
