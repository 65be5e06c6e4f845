"""Command-line options that make an engine, the same for every command."""

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import jaxengine
from jaxengine.config import EngineConfig
from jaxengine.errors import ConfigError


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --preset and --set."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model",
        default=jaxengine.DEMO_MODEL,
        metavar="PATH",
        help="checkpoint folder, GGUF file or hub id (default: the embedded demo model)",
    )
    group.add_argument("--preset", metavar="TOML", help="settings from a file, as in configs/")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of EngineConfig, such as context_length=4096; may be repeated",
    )


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the options ask for, as keywords of Engine, `model_path` apart.

    Raises:
      ConfigError: For a preset that cannot be read, or an assignment that is none.
    """
    settings: dict[str, Any] = {}
    if args.preset:
        try:
            settings = tomllib.loads(Path(args.preset).read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"The preset {args.preset!r} cannot be read: {error}.") from error
    for assignment in args.set:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"`--set` takes NAME=VALUE, got {assignment!r}.")
        settings[name] = from_json_or_text(value)
    settings.pop("model_path", None)
    try:
        EngineConfig.from_kwargs(settings)
    except TypeError as error:  # a name nobody knows
        raise ConfigError(str(error)) from error
    return settings


def from_json_or_text(value: str) -> Any:
    """The value of an option: JSON where it is JSON, else the text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
