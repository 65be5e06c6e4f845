"""The command line of every operation's `bench`."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax


class Spec(Protocol):
    """A named setting of an operation."""

    @property
    def name(self) -> str: ...


def print_rows(
    description: str | None,
    specs: Sequence[Spec],
    rows: Callable[..., Iterable[dict[str, Any]]],
    argv: Sequence[str] | None = None,
) -> None:
    """Prints the rows of the specs the command names, all by default, as JSON lines.

    Args:
      description: Of the command.
      specs: Those it may name.
      rows: `rows(device, specs, is_sweep)` measures.
      argv: The command's arguments; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=description)
    names = [spec.name for spec in specs]
    parser.add_argument("specs", nargs="*", help=f"all by default; of {', '.join(names)}")
    parser.add_argument("--defaults-only", action="store_true", help="no other choices")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.specs if name not in names]:
        parser.error(f"no spec is called {', '.join(unknown)}")
    chosen = [spec for spec in specs if not args.specs or spec.name in args.specs]
    for row in rows(jax.devices("gpu")[0], chosen, is_sweep=not args.defaults_only):
        print(json.dumps(row), flush=True)
