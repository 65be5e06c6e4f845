"""The benches' command line, with a device and rows that cost nothing."""

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from pallas_kernels import bench_main

FOLDERS = sorted(p.parent.name for p in Path(bench_main.__file__).parent.glob("*/bench.py"))


class Named(NamedTuple):
    name: str


SPECS = [Named("a"), Named("b")]


def rows(device: Any, specs: Any, is_sweep: bool) -> list[dict[str, Any]]:
    return [{"device": device, "spec": spec.name, "is_sweep": is_sweep} for spec in specs]


@pytest.mark.parametrize(
    "argv, names, is_sweep", [([], "ab", True), (["b", "--defaults-only"], "b", False)]
)
def test_named_specs_are_printed(argv: list[str], names: str, is_sweep: bool, capsys: Any):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda kind: [kind])
        bench_main.print_rows("d", SPECS, rows, argv)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == rows("gpu", [Named(name) for name in names], is_sweep)


def test_unknown_spec_is_refused(capsys: Any):
    with pytest.raises(SystemExit):
        bench_main.print_rows("d", SPECS, rows, ["c"])
    assert "no spec is called c" in capsys.readouterr().err


@pytest.mark.parametrize("name", FOLDERS)
def test_every_bench_takes_what_the_command_gives(name: str):
    """No spec, no row; and nothing is measured."""
    bench = importlib.import_module(f"pallas_kernels.{name}.bench")
    assert list(bench.rows(jax.local_devices()[0], [], is_sweep=False)) == []
