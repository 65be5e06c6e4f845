"""From an EngineConfig to a running core: files, shapes, weights, programs, in that order."""

import dataclasses
import functools
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
from jaxengine.errors import CapacityError, ConfigError
from jaxengine.gguf_file import is_gguf
from jaxengine.locate import locate, read_model_config
from jaxengine.log import logger
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel, Family, Params
from jaxengine.nn.attention import ForwardContext
from jaxengine.runtime import weights
from jaxengine.runtime.checkpoints import open_checkpoint
from jaxengine.runtime.executables import ExecutableCache, default_cache_dir, fingerprint
from jaxengine.runtime.forward import Forward
from jaxengine.runtime.kv_cache import max_num_pages
from jaxengine.runtime.program_factory import ProgramFactory
from jaxengine.runtime.programs import IDLE, ProgramKey, Programs
from jaxengine.runtime.runner import Runner
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
GPU_DECODE, CPU_DECODE = (1, 16, 32, 64, 128, 192, 256), (1, 4, 8)
"""Buckets below the largest, which is the chunk size or the number of slots."""

LARGE_GPU_BYTES = 60 << 30
"""From so much memory on there are slots, and logits, for 512 sequences; below, for 256."""

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
            model_config = read_model_config(locate(config), config.model_overrides)
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
            layers=_hidden_layers(config, model_config),
        )
        samplers = Samplers(forward, sampler)
        factory = ProgramFactory(forward, target, mesh, limits.num_pages, dtype)
        own = samplers.own.steps
        # The cache's keys cover this package's source, not that of a sampler from outside.
        is_cached = are_equal(sampler, default_sampler())
        specs = factory.fused(own, is_cached=is_cached)
        specs |= factory.admit()
        shapes = (
            layout.describe(),
            own.layout.describe(),
            own.result.describe(),
            forward.layers,
        )
        cache = _executable_cache(config, model_config, limits, shapes)
    logger.info("resolved configuration:\n%s", config.describe())
    # Compiling needs shapes only, so it overlaps with loading the weights.
    programs = Programs(specs, first=factory.first(), cache=cache, progress=progress)
    if device.platform == "gpu":
        # On a CPU, compiling what may never be needed would take the cores the engine runs on.
        programs.add(factory.forwards() | factory.split(own, is_cached=is_cached), IDLE)
    try:
        with clock("weights"):
            if params is not None:
                arrays = weights.check_params(params, target)
            else:
                arrays = load_params(config, family, model_config, target, progress)
        runner = Runner(factory, arrays, samplers, programs)
    except BaseException:
        programs.stop()
        raise
    scheduler = Scheduler(
        limits.buckets,
        PagePool(limits.num_pages),
        lambda kind, size: programs.is_ready(ProgramKey(kind, size)),
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


def _hidden_layers(config: EngineConfig, model: ModelConfig) -> tuple[int, ...]:
    layers = config.hidden_layers or ()
    if not all(0 <= i <= model.num_layers for i in layers):
        raise ConfigError(
            f"`hidden_layers` must be in [0, {model.num_layers}], got {layers}; "
            f"{model.num_layers} is after the final norm."
        )
    return tuple(layers)


def load_params(
    config: EngineConfig, family: Family, model: ModelConfig, target: Params, progress: bool
) -> Params:
    """The arrays of the checkpoint at `config.model_path`, on the device.

    Raises:
      WeightsError: For tensors that do not fit.
      ConfigError: If there is no checkpoint.
    """
    if config.load_format == "dummy":
        return weights.random_params(target)
    path = locate(config)
    if (path / weights.ORBAX_FOLDER).exists() and config.load_format != "safetensors":
        return weights.load_orbax(path, target)
    return _load_checkpoint(path, family, model, target, progress=progress)


def _load_checkpoint(
    path: Path, family: Family, model: ModelConfig, target: Params, *, progress: bool
) -> Params:
    parts = family.weight_parts(model)
    checkpoint = open_checkpoint(path, parts.keys())
    return weights.load_checkpoint(checkpoint, parts, target, progress=progress)


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
    folder = locate(EngineConfig(model_path=source))
    if is_gguf(folder):
        raise ConfigError(f"{source} is a GGUF file; a checkpoint folder is converted.")
    model_config = read_model_config(folder)
    family = MODELS[model_config.architecture]
    model = BoundModel(family, model_config, jnp.dtype(model_config.dtype))
    shapes = weights.place(model, make_mesh(jax.devices()[:1]))
    params = _load_checkpoint(folder, family, model_config, shapes, progress=True)
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
      CapacityError: If the model does not fit.
    """
    is_gpu = device.platform == "gpu"
    dtype = _dtype(config, model, device)
    context = _context_length(config, model)
    pages_per_sequence = -(-context // config.page_size)
    slots = config.max_running_requests or _default_slots(device)
    chunk = config.chunked_prefill_size or (8192 if is_gpu else 256)
    chunk = context if chunk == -1 else min(chunk, context)
    chunk = -(-chunk // config.page_size) * config.page_size
    prefill = config.prefill_buckets or (GPU_PREFILL if is_gpu else CPU_PREFILL)
    decode = config.decode_buckets or (GPU_DECODE if is_gpu else CPU_DECODE)
    per_slot = 4 * slot_width + jnp.dtype(COUNT_DTYPE).itemsize * model.vocab_size
    needs = {"the weights": weight_bytes, f"{slots} sequences' state": slots * per_slot}
    least = 1 + min(chunk, context) // config.page_size
    page_bytes = config.page_size * model.kv_bytes_per_token[dtype]
    num_pages = _pages_in_memory(config, page_bytes, least, needs, device)
    num_pages = min(num_pages, max_num_pages(model, config.page_size))
    return Limits(
        dtype=dtype,
        context_length=context,
        num_pages=min(num_pages, 1 + slots * pages_per_sequence),
        buckets=Buckets(
            decode_rows=(*(b for b in decode if b < slots), slots),
            prefill_tokens=(*(t for t in prefill if t < chunk), chunk),
            num_slots=slots,
            page_size=config.page_size,
            max_window_steps=config.max_window_steps,
        ),
    )


def _pages_in_memory(
    config: EngineConfig, page_bytes: int, least: int, needs: dict[str, int], device: Any
) -> int:
    """KV pages: as many as `max_total_tokens` says, else as many as fit.

    Args:
      config: Settings.
      page_bytes: Bytes of a page.
      least: Pages without which an engine is of no use: those of one prefill call.
      needs: Bytes of everything else that will be allocated, by name.
      device: Where all will be.

    Raises:
      CapacityError: Says what needs how much, how much there is, and what to do.
    """
    asked = config.max_total_tokens and 1 + -(-config.max_total_tokens // config.page_size)
    memory = device.memory_stats() or {}
    if "bytes_limit" not in memory:
        return asked or max(2, _round_down(CPU_KV_BYTES // page_bytes))
    # What is asked for by number may take the rest of the memory, too.
    share = 1.0 if asked else config.mem_fraction_static
    limit, in_use = memory["bytes_limit"], memory["bytes_in_use"]
    there = int(limit * share) - in_use
    room = max(0, there - sum(needs.values())) // page_bytes
    if room >= (asked or least):
        return asked or _round_down(room)
    pages = asked or least
    needs = needs | {f"KV pages of {(pages - 1) * config.page_size:,} tokens": pages * page_bytes}
    parts = ", ".join(f"{_gb(size)} for {name}" for name, size in needs.items())
    remedy = "lower `max_total_tokens`" if asked else "raise `mem_fraction_static`"
    raise CapacityError(
        f"{_gb(sum(needs.values()))} are needed ({parts}), and there are {_gb(there)}: {share:.0%} "
        f"of the {_gb(limit)} that JAX may use, less {_gb(in_use)} in use. Use a smaller model or "
        f"a larger GPU, {remedy}, or, where the GPU has more memory, set "
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 before JAX starts."
    )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _default_slots(device: Any) -> int:
    if device.platform != "gpu":
        return 16
    memory = device.memory_stats() or {}
    return 512 if memory.get("bytes_limit", 0) >= LARGE_GPU_BYTES else 256


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
        raise ConfigError(
            f"`context_length` {config.context_length:,} exceeds the model's {most:,}, which is "
            "its config's with rope scaling, or its attention window. Lower it, or change the "
            "config by `json_model_override_args`."
        )
    return config.context_length or most


class _timed:
    """Adds a block's seconds to a dict."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._started
