"""Settles what the settings leave open: sizes that depend on the model and the device."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.errors import CapacityError, ConfigError
from jaxengine.log import logger
from jaxengine.runtime.kv_cache import max_num_pages
from jaxengine.runtime.state import COUNT_DTYPE
from jaxengine.scheduler.buckets import Buckets

GPU_PREFILL, CPU_PREFILL = (64, 256, 1024, 2048, 4096), (32,)
GPU_DECODE, CPU_DECODE = (1, 16, 32, 64, 128, 192, 256), (1, 4, 8)
"""Buckets below the largest, which is the chunk size or the number of slots."""

LARGE_GPU_BYTES = 60 << 30
"""From so much memory on there are slots, and logits, for 512 sequences; below, for 256."""

CPU_KV_BYTES = 512 << 20
"""KV pages on a CPU unless `max_total_tokens` says otherwise."""


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
    dtype = dtype_of(config, model, device)
    context = context_length_of(config, model)
    if config.context_length is None and context == model.sliding_window:
        logger.warning(
            "The context is limited to %s tokens: the model's attention slides a window of so "
            "many, and longer texts are not supported here.",
            f"{context:,}",
        )
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


def dtype_of(config: EngineConfig, model: ModelConfig, device: Any) -> str:
    """Of weights, activations and KV pages."""
    # bfloat16 on a CPU would be converted to float32 in every call.
    auto = model.dtype if device.platform == "gpu" else "float32"
    return {"auto": auto, "half": "float16"}.get(config.dtype, config.dtype)


def context_length_of(config: EngineConfig, model: ModelConfig) -> int:
    """Longest prompt plus output, in tokens.

    Raises:
      ConfigError: If more is asked for than the model can do here.
    """
    asked, most = config.context_length, model.max_position_embeddings
    if asked is None or asked <= most:
        return asked or most
    if model.sliding_window == most:
        raise ConfigError(
            f"`context_length` {asked:,} exceeds the model's sliding attention window of {most:,} "
            "tokens. Up to there it attends to all of a text, and that is all that is supported "
            "here: lower it, or leave it out."
        )
    raise ConfigError(
        f"`context_length` {asked:,} exceeds the model's {most:,}, its config's with rope "
        "scaling. Lower it, or change the config by `json_model_override_args`."
    )
