"""From an EngineConfig to a running core: files, shapes, weights, programs, in that order."""

import functools
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.core import EngineCore
from jaxengine.errors import ConfigError
from jaxengine.gguf_file import is_gguf
from jaxengine.limits import Limits, context_length_of, dtype_of, fill_in, settle
from jaxengine.locate import locate, read_model_config
from jaxengine.log import logger
from jaxengine.models import MODELS
from jaxengine.models.family import BoundModel, Family, Params
from jaxengine.nn.attention import ForwardContext
from jaxengine.runtime import weights
from jaxengine.runtime.checkpoints import open_checkpoint
from jaxengine.runtime.executables import ExecutableCache, default_cache_dir, fingerprint
from jaxengine.runtime.forward import Forward
from jaxengine.runtime.program_factory import ProgramFactory
from jaxengine.runtime.programs import IDLE, ProgramKey, Programs
from jaxengine.runtime.runner import Runner
from jaxengine.runtime.samplers import Samplers
from jaxengine.runtime.sharding import make_mesh
from jaxengine.runtime.slots import sampler_layout, slot_layout
from jaxengine.sampling.identity import are_equal
from jaxengine.sampling.sampler import Sampler, default_sampler
from jaxengine.scheduler.page_pool import PagePool
from jaxengine.scheduler.policy import Policy
from jaxengine.scheduler.scheduler import Scheduler


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
    limits: Limits
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
        dtype = jnp.dtype(dtype_of(config, model_config, device))
        model = BoundModel(family, model_config, dtype)
        target = weights.place(model, mesh)
        context_length = context_length_of(config, model_config)
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


class _timed:
    """Adds a block's seconds to a dict."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._started
