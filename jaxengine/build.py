"""From an EngineConfig to a running core: files, shapes, weights, programs, in that order."""

import dataclasses
import functools
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.core import EngineCore
from jaxengine.errors import CapacityError, ConfigError, UnsupportedModelError
from jaxengine.log import logger
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel, Family, Params
from jaxengine.nn.attention import ForwardContext
from jaxengine.runtime import weights
from jaxengine.runtime.forward import Forward
from jaxengine.runtime.kv_cache import max_num_pages
from jaxengine.runtime.programs import (
    IDLE,
    ExecutableCache,
    ProgramKey,
    Programs,
    default_cache_dir,
    fingerprint,
)
from jaxengine.runtime.runner import ProgramFactory, Runner
from jaxengine.runtime.samplers import Samplers
from jaxengine.runtime.sharding import make_mesh
from jaxengine.runtime.slots import sampler_layout, slot_layout
from jaxengine.runtime.state import COUNT_DTYPE
from jaxengine.sampling.identity import are_equal
from jaxengine.sampling.sampler import Sampler, default_sampler
from jaxengine.scheduler.buckets import Buckets
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.policy import Policy
from jaxengine.scheduler.scheduler import Scheduler

GPU_PREFILL, CPU_PREFILL = (64, 256, 1024, 2048, 4096), (32,)
GPU_DECODE, CPU_DECODE = (1, 4, 16, 32, 64, 128, 192), (1, 4)
"""Buckets below the largest, which is the chunk size or the number of slots."""

CPU_KV_BYTES = 512 << 20
"""KV pages on a CPU unless `max_total_tokens` says otherwise."""


@dataclass(frozen=True)
class Built:
    """A core and what its owner must know of it.

    Attributes:
      core: Ready to step.
      runner: Owns the device arrays.
      programs: Still compiling, perhaps.
      samplers: The engine's own, and those that requests bring.
      model_config: The model's shape.
      config: The settings with every None resolved.
      limits: What was settled.
      seconds: Where start-up went.
    """

    core: EngineCore
    runner: Runner
    programs: Programs
    samplers: Samplers
    model_config: ModelConfig
    config: EngineConfig
    limits: "Limits"
    seconds: Mapping[str, float]


def resolve_folder(config: EngineConfig) -> Path:
    """The checkpoint's folder: a local one, or a snapshot in the hub's cache.

    Raises:
      ConfigError: Says what was looked for, and where.
    """
    path = Path(config.model_path).expanduser()
    if path.is_dir():
        return path
    if not config.model_path or path.is_absolute() or config.model_path.startswith("."):
        raise ConfigError(
            f"`model_path` {config.model_path!r} is not a folder. "
            "Pass a checkpoint folder, a hub id, or jaxengine.DEMO_MODEL."
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


def read_model_config(folder: Path) -> ModelConfig:
    """`config.json`, with the EOS ids of `generation_config.json` added.

    Raises:
      UnsupportedModelError: Names the architecture or field that is not supported.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ConfigError(f"{folder} has no config.json, so it is not a checkpoint folder.")
    raw = json.loads(file.read_text())
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in MODELS:
        raise UnsupportedModelError(
            f"`architectures` of {folder} is {architecture!r}; supported: {', '.join(MODELS)}."
        )
    config = MODELS[architecture].parse_config(raw)
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = json.loads(generation.read_text()).get("eos_token_id")
        more = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        config = dataclasses.replace(
            config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more)))
        )
    return config


def build(
    config: EngineConfig,
    sampler: Sampler,
    *,
    params: Params | None = None,
    model_config: ModelConfig | None = None,
    progress: bool,
) -> Built:
    """Builds everything between the tokenizer and the device.

    Args:
      config: Settings.
      sampler: Traced into every step.
      params: Arrays of the caller's own instead of a checkpoint; needs `model_config`.
      model_config: Shape of `params`.
      progress: Show progress bars.
    """
    seconds: dict[str, float] = {}
    clock = functools.partial(_timed, seconds)
    with clock("plan"):
        if model_config is None:
            model_config = read_model_config(resolve_folder(config))
        device = jax.devices()[0]
        mesh = make_mesh([device])
        family = MODELS[model_config.architecture]
        dtype = jnp.dtype(_dtype(config, model_config, device))
        model = BoundModel(family, model_config, dtype)
        target = weights.place(model, mesh)
        context_length = _context_length(config, model_config)
        layout = slot_layout(-(-context_length // config.page_size))
        to_load = 0 if params is not None else _num_bytes(target)
        slot_width = layout.width + sampler_layout(sampler).width
        limits = settle(config, model_config, slot_width, to_load, device)
        config = fill_in(config, limits)
        forward = Forward(
            model=model,
            layout=layout,
            buckets=limits.buckets,
            ctx=ForwardContext(mesh=mesh),
            num_top=config.max_top_logprobs,
        )
        samplers = Samplers(forward, sampler)
        factory = ProgramFactory(forward, target, mesh, limits.num_pages, dtype)
        own = samplers.own.steps
        # The cache's keys cover this package's source, not that of a sampler from outside.
        specs = factory.fused(own, is_cached=are_equal(sampler, default_sampler()))
        specs |= factory.admit()
        shapes = (layout.describe(), own.layout.describe(), own.result.describe())
        cache = _executable_cache(config, model_config, limits, shapes)
    logger.info("resolved configuration:\n%s", config.describe())
    # Compiling needs shapes only, so it overlaps with loading the weights.
    programs = Programs(specs, first=factory.first(), cache=cache, progress=progress)
    if device.platform == "gpu":
        # On a CPU, compiling what may never be needed would take the cores the engine runs on.
        programs.add(factory.forwards(), IDLE)
    try:
        with clock("weights"):
            if params is not None:
                arrays = weights.check_params(params, target)
            else:
                arrays = _load_params(config, family, model_config, target, progress)
        runner = Runner(factory, arrays, samplers, programs)
    except BaseException:
        programs.stop()
        raise
    scheduler = Scheduler(
        limits.buckets,
        PagePool(limits.num_pages),
        lambda key: programs.is_ready(ProgramKey(*key)),
        policy=_policy(config),
        has_prefix_cache=not config.disable_radix_cache,
    )
    page_bytes = config.page_size * model_config.kv_bytes_per_token[limits.dtype]
    core = EngineCore(scheduler, runner, page_bytes)
    return Built(core, runner, programs, samplers, model_config, config, limits, seconds)


def _policy(config: EngineConfig) -> Policy:
    threshold = config.priority_scheduling_preemption_threshold
    return Policy(
        schedule_policy="priority" if config.has_priorities else config.schedule_policy,
        preemption_threshold=None if config.disable_priority_preemption else threshold,
        low_values_first=config.schedule_low_priority_values_first,
    )


def _load_params(
    config: EngineConfig, family: Family, model: ModelConfig, target: Params, progress: bool
) -> Params:
    if config.load_format == "dummy":
        return weights.random_params(target)
    folder = resolve_folder(config)
    if (folder / weights.ORBAX_FOLDER).exists() and config.load_format != "safetensors":
        return weights.load_orbax(folder, target)
    return weights.load_safetensors(folder, family.weight_parts(model), target, progress=progress)


def convert(source: str, target: Path) -> None:
    """Rewrites a safetensors checkpoint as an Orbax one, tokenizer and configs beside it.

    Args:
      source: Checkpoint folder or hub id.
      target: New folder.

    Raises:
      ConfigError: If `target` exists, or `source` is no checkpoint.
    """
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new folder.")
    folder = resolve_folder(EngineConfig(model_path=source))
    model_config = read_model_config(folder)
    family = MODELS[model_config.architecture]
    model = BoundModel(family, model_config, jnp.dtype(model_config.dtype))
    shapes = weights.place(model, make_mesh(jax.devices()[:1]))
    parts = family.weight_parts(model_config)
    params = weights.load_safetensors(folder, parts, shapes, progress=True)
    weights.save_orbax(params, target)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in file.name:
            shutil.copy(file, target)


def _executable_cache(config: EngineConfig, *parts: object) -> ExecutableCache | None:
    if not config.executable_cache:
        return None
    folder = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    return ExecutableCache(folder, fingerprint(*parts))


def _num_bytes(tree: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Settings whose defaults depend on the model and the device, settled.

    Attributes:
      dtype: Weights, activations and KV pages.
      context_length: Longest prompt plus output, in tokens.
      num_pages: KV pages, the null page included.
      buckets: All static sizes.
    """

    dtype: str
    context_length: int
    num_pages: int
    buckets: Buckets

    @property
    def max_total_tokens(self) -> int:
        """Tokens the pages hold."""
        return (self.num_pages - 1) * self.buckets.page_size


def fill_in(config: EngineConfig, limits: Limits) -> EngineConfig:
    """The settings with every open one filled in."""
    buckets = limits.buckets
    return dataclasses.replace(
        config,
        dtype=limits.dtype,
        context_length=limits.context_length,
        max_running_requests=buckets.num_slots,
        max_total_tokens=limits.max_total_tokens,
        chunked_prefill_size=buckets.prefill_tokens[-1],
        prefill_buckets=buckets.prefill_tokens,
        decode_buckets=buckets.decode_rows,
    )


def settle(
    config: EngineConfig, model: ModelConfig, slot_width: int, weight_bytes: int, device: Any
) -> Limits:
    """Settles what depends on the model and the device.

    Args:
      config: Settings.
      model: The model's shape.
      slot_width: Cells of a slot's row.
      weight_bytes: Bytes of weights still to be loaded.
      device: Where all will be.

    Raises:
      ConfigError: If `context_length` exceeds the model's.
      CapacityError: If no memory is left for KV pages.
    """
    is_gpu = device.platform == "gpu"
    dtype = _dtype(config, model, device)
    context = _context_length(config, model)
    pages_per_sequence = -(-context // config.page_size)
    slots = config.max_running_requests or (256 if is_gpu else 16)
    chunk = config.chunked_prefill_size or (8192 if is_gpu else 256)
    chunk = context if chunk == -1 else min(chunk, context)
    chunk = -(-chunk // config.page_size) * config.page_size
    prefill = config.prefill_buckets or (GPU_PREFILL if is_gpu else CPU_PREFILL)
    decode = config.decode_buckets or (GPU_DECODE if is_gpu else CPU_DECODE)
    page_bytes = config.page_size * model.kv_bytes_per_token[dtype]
    if config.max_total_tokens is not None:
        num_pages = 1 + -(-config.max_total_tokens // config.page_size)
    else:
        per_slot = 4 * slot_width + jnp.dtype(COUNT_DTYPE).itemsize * model.vocab_size
        num_pages = _pages_in_memory(config, page_bytes, weight_bytes + slots * per_slot, device)
        num_pages = min(num_pages, max_num_pages(model, config.page_size))
    return Limits(
        dtype=dtype,
        context_length=context,
        num_pages=min(num_pages, 1 + slots * pages_per_sequence),
        buckets=Buckets(
            decode_rows=(*(b for b in decode if b < slots), slots),
            prefill_tokens=(*(t for t in prefill if t < chunk), chunk),
            # Plain XLA gathers every page of the bucket, so short sequences get a small one.
            num_pages=(pages_per_sequence,)
            if is_gpu
            else tuple(sorted({-(-pages_per_sequence // 4), pages_per_sequence})),
            num_slots=slots,
            page_size=config.page_size,
            max_window_steps=config.max_window_steps,
        ),
    )


def _pages_in_memory(config: EngineConfig, page_bytes: int, other_bytes: int, device: Any) -> int:
    memory = device.memory_stats() or {}
    free = CPU_KV_BYTES
    if "bytes_limit" in memory:
        free = int(memory["bytes_limit"] * config.mem_fraction_static)
        free -= memory["bytes_in_use"] + other_bytes
    pages = _round_down(free // page_bytes)
    if pages < 2:
        raise CapacityError(
            f"No memory is left for KV pages: {free / 1e9:.2f} GB free of "
            f"{memory.get('bytes_limit', 0) / 1e9:.2f} GB after the weights, and a page takes "
            f"{page_bytes / 1e6:.2f} MB. Raise `mem_fraction_static` or use a smaller model."
        )
    return pages


def _round_down(pages: int) -> int:
    """Keeps five leading bits, so that a few free megabytes more or less give the same shapes."""
    drop = max(0, pages.bit_length() - 5)
    return pages >> drop << drop


def _dtype(config: EngineConfig, model: ModelConfig, device: Any) -> str:
    # bfloat16 on a CPU would be converted to float32 in every call.
    auto = model.dtype if device.platform == "gpu" else "float32"
    return {"auto": auto, "half": "float16"}.get(config.dtype, config.dtype)


def _context_length(config: EngineConfig, model: ModelConfig) -> int:
    most = model.max_position_embeddings
    if config.context_length is not None and config.context_length > most:
        raise ConfigError(f"`context_length` {config.context_length} exceeds the model's {most}.")
    return config.context_length or most


class _timed:
    """Adds a block's seconds to a dict."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._started
