"""Finds a checkpoint, a folder, a hub snapshot or a GGUF file, and reads its configs."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.errors import ConfigError, UnsupportedModelError
from jaxengine.gguf_file import GGUFFile, is_gguf
from jaxengine.models import MODELS


def locate(config: EngineConfig) -> Path:
    """Where the checkpoint is: a folder, a snapshot in the hub's cache, or a GGUF file.

    Raises:
      ConfigError: Says what was looked for, and where.
    """
    if not config.model_path:
        raise ConfigError(
            "`model_path` is missing: pass a checkpoint folder, a .gguf file, a hub id, or "
            "jaxengine.DEMO_MODEL."
        )
    path = Path(config.model_path).expanduser()
    if config.load_format == "gguf" and not is_gguf(path):
        raise ConfigError(
            f"`load_format` 'gguf' needs a .gguf file as `model_path`, got {config.model_path!r}."
        )
    if path.is_dir() or (path.is_file() and is_gguf(path)):
        return path
    is_local = path.is_absolute() or config.model_path.startswith(".") or is_gguf(path)
    if is_local:
        raise ConfigError(
            f"`model_path` {config.model_path!r} is not a folder. "
            "Pass a checkpoint folder, a .gguf file, a hub id, or jaxengine.DEMO_MODEL."
        )
    from huggingface_hub import constants, snapshot_download

    cache = config.download_dir or constants.HF_HUB_CACHE
    cached = _cached_snapshot(Path(cache), config.model_path, config.revision)
    if cached is not None:
        return cached
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(
            snapshot_download(
                config.model_path,
                revision=config.revision,
                cache_dir=config.download_dir,
                allow_patterns=patterns,
            )
        )
    except Exception as error:
        raise ConfigError(
            f"`model_path` {config.model_path!r} is neither a folder nor in the hub cache {cache} "
            f"(looked for models--{config.model_path.replace('/', '--')} in any letter case), and "
            f"downloading it failed: {type(error).__name__}. Check the name and the network, or "
            "pass a local folder."
        ) from error


def _cached_snapshot(cache: Path, model_id: str, revision: str | None) -> Path | None:
    """A complete snapshot of the id in the hub's cache, whatever the letter case of the id."""
    wanted = f"models--{model_id.replace('/', '--')}".lower()
    folders = [f for f in cache.glob("models--*") if f.name.lower() == wanted]
    for folder in folders:
        ref = folder / "refs" / (revision or "main")
        commit = ref.read_text().strip() if ref.exists() else revision or ""
        snapshot = folder / "snapshots" / commit
        if commit and (snapshot / "config.json").exists():
            return snapshot
    return None


def read_model_config(path: Path, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """`config.json`, with the EOS ids of `generation_config.json` added; or a GGUF file's.

    Args:
      path: What `locate` gave.
      overrides: Fields in place of the config's own; a dict merges into one that is there.

    Raises:
      UnsupportedModelError: Names the architecture or field that is not supported.
    """
    raw = _merged(_raw_config(path), overrides or {})
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in MODELS:
        raise UnsupportedModelError(
            f"`architectures` of {path} is {architecture!r}; supported: {', '.join(MODELS)}."
        )
    config = MODELS[architecture].parse_config(raw)
    eos = read_generation_config(path).get("eos_token_id")
    more = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return dataclasses.replace(
        config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more)))
    )


def read_generation_config(path: Path) -> dict[str, Any]:
    """`generation_config.json`; empty where there is none."""
    file = path / "generation_config.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _raw_config(path: Path) -> dict[str, Any]:
    if is_gguf(path):
        return GGUFFile(path).raw_config
    file = path / "config.json"
    if not file.exists():
        found = sorted(path.glob("*.gguf"))
        remedy = f" Pass {found[0]} itself." if found else ""
        raise ConfigError(f"{path} has no config.json, so it is not a checkpoint folder.{remedy}")
    return json.loads(file.read_text())


def _merged(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """As SGLang merges `json_model_override_args`: dict by dict, else value for value."""
    merged = dict(raw)
    for name, value in overrides.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        merged[name] = value
    return merged
