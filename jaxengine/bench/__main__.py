"""The command: `python -m jaxengine.bench w1 w2 --json`, and `... report` for README."""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from typing import Any

from jaxengine.bench import report, startup
from jaxengine.bench.measure import Options
from jaxengine.bench.roofline import Peaks
from jaxengine.bench.run import run
from jaxengine.bench.shapes import SHAPES
from jaxengine.bench.workloads import GROUPS, STARTUP, WORKLOADS, expand


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and runs it; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == [startup.CHILD]:
        startup.run_child(json.loads(argv[1]))
        return 0
    if argv == ["report"]:
        return report.main()
    names, options = parse(argv)
    return run(names, options)


def parse(argv: Sequence[str]) -> tuple[list[str], Options]:
    """Reads a command line: workloads in order, groups expanded, and the options."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    try:
        names = expand(args.workloads)
    except KeyError as error:
        near = difflib.get_close_matches(error.args[0], [*WORKLOADS, *GROUPS, STARTUP], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; see --help."
        parser.error(f"there is no workload {error.args[0]!r}{hint}")
    if args.profile and STARTUP in names:
        parser.error("--profile traces this process, and w5 runs in others; leave one out.")
    if args.runs < 1 or args.scale <= 0:
        parser.error("--runs must be at least 1 and --scale above 0.")
    return names, Options(
        shape=args.shape,
        dtype=args.dtype,
        settings=dict(args.set),
        cache_dir=args.cache_dir,
        runs=args.runs,
        scale=args.scale,
        peaks=Peaks(args.peak_bytes_per_s, args.peak_flops_per_s),
        profile_dir=args.profile,
        commit=args.commit,
        is_json=args.json,
        out=args.out,
    )


def _parser() -> argparse.ArgumentParser:
    described = [f"  {name:<18} {workload.title}" for name, workload in WORKLOADS.items()]
    described.append(f"  {STARTUP:<18} process start to second token, to all programs; cold, warm")
    described += [f"  {group:<18} {' '.join(members)}" for group, members in GROUPS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m jaxengine.bench",
        description="Times the engine with random weights, token ids in and out. Every result is "
        "one line, with the checks made in the same run; the exit code is 1 if any failed.",
        epilog="report alone renews README from the result files.\n\nworkloads:\n"
        + "\n".join(described),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workloads", nargs="+", metavar="WORKLOAD", help="see the list below")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--out", metavar="FILE", help="also append the JSON lines to FILE")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="timed passes (3)")
    parser.add_argument("--shape", choices=SHAPES, help="model shape instead of the workload's own")
    parser.add_argument("--dtype", default="auto", help="weights and activations (auto)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="factor on counts and lengths (1)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="an engine setting, e.g. max_window_steps=64 or decode_buckets=[1,256]",
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="executable cache; without it all is compiled, so results can name every kernel",
    )
    parser.add_argument("--profile", metavar="DIR", help="trace one further pass of each workload")
    parser.add_argument("--peak-bytes-per-s", type=float, metavar="X", help="for the roofline")
    parser.add_argument("--peak-flops-per-s", type=float, metavar="X", help="for the roofline")
    parser.add_argument("--commit", metavar="ID", help="for results, where git cannot tell")
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
