"""What an engine is built from: the model's shape and the engine's settings. Knows nothing of jax.

Both are frozen; a change is `dataclasses.replace`. Functions are never config.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxengine.compat import nearest
from jaxengine.engine_arguments import ENGINE_ARGUMENTS
from jaxengine.errors import ConfigError
from jaxengine.log import logger

SCHEDULE_POLICIES = ("fcfs", "lpm", "priority")
DTypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those of the pre-training.

    Attributes:
      kind: "linear" slows all of them; "llama3" and "yarn" slow the slow ones.
      factor: By how much; at least 1.
      original_context_len: Of the pre-training, in tokens.
      low_freq_factor: llama3: slowed in full below this many turns in the original context.
      high_freq_factor: llama3: left alone above this many.
      beta_fast: yarn: left alone above this many turns in the original context.
      beta_slow: yarn: slowed in full below this many.
      truncate: yarn: both ends are rounded outwards to whole pairs of dimensions.
      attention_factor: Times cosines and sines.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_context_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a dense decoder, whatever its family.

    Attributes:
      architecture: Hugging Face architecture name, the key into `jaxengine.models.MODELS`.
      vocab_size: Rows of the embedding; ids are in [0, vocab_size).
      hidden_size: Width of the residual stream.
      intermediate_size: Width of the feed-forward layer.
      num_layers: Decoder layers.
      num_heads: Query heads.
      num_kv_heads: Key/value heads; divides `num_heads`.
      head_dim: Width of a head.
      rms_norm_eps: Epsilon of the norms.
      rope_theta: Base of the rotary frequencies.
      tie_word_embeddings: The output projection is the embedding.
      max_position_embeddings: Longest sequence the model is run on, in tokens: what it was made
        for, with `rope_scaling`, but no longer than its `sliding_window`.
      sliding_window: Positions a token attends to, its own included; None for all.
      rope_scaling: Change of the rotary frequencies; None for none.
      qkv_bias: The query, key and value projections have biases.
      qk_norm: Query and key heads are normalised before they are rotated.
      dtype: The checkpoint's own dtype.
      eos_token_ids: Ids that end a text, from the config and the generation config.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    dtype: DTypeName = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"`num_attention_heads` must be a multiple of `num_key_value_heads`; "
                f"got {self.num_heads} and {self.num_kv_heads}."
            )

    @property
    def kv_bytes_per_token(self) -> dict[str, int]:
        """Bytes of keys and values per token over all layers, by KV dtype."""
        values = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return {"float32": 4 * values, "bfloat16": 2 * values, "float16": 2 * values}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Every setting of an engine, under SGLang's names where it has them.

    Attributes:
      model_path: Folder of a checkpoint, or a hub id.
      tokenizer_path: Folder or hub id of the tokenizer; the model's when None.
      skip_tokenizer_init: Ids in, ids out; no tokenizer is loaded.
      load_format: "auto" (safetensors, Orbax where the folder holds one, or a GGUF file),
        "safetensors", "orbax", "gguf", or "dummy" (random).
      json_model_override_args: Fields in place of `config.json`'s own, a dict or its JSON; a dict
        merges into one that is there: {"rope_scaling": {"type": "yarn", "factor": 4.0}}.
      dtype: Weights and activations; "auto" is the checkpoint's on a GPU and float32 on a CPU.
      context_length: Longest prompt plus output, in tokens; the model's own when None.
      mem_fraction_static: Share of the device memory for weights and KV pages, in (0, 1).
      max_running_requests: Sequences that run at once (decode slots); chosen by device when None.
      max_queued_requests: Samples that may wait beside `max_running_requests` that run; a call that
        would exceed it fails with QueueFullError. No limit when None.
      max_total_tokens: Tokens the KV pages hold; from the free memory when None.
      page_size: Tokens in a KV page.
      chunked_prefill_size: Most prompt tokens in one prefill call; chosen by device when None.
      schedule_policy: Who is next: "fcfs", first come first served; "lpm", longest cached prefix
        first; "priority", highest `priority` first, which may preempt those that run.
      enable_priority_scheduling: SGLang's name for `schedule_policy="priority"`.
      schedule_low_priority_values_first: Low priorities are the better ones.
      priority_scheduling_preemption_threshold: One that runs is preempted for one whose priority is
        better by at least so much.
      disable_priority_preemption: Who runs, runs on.
      default_priority_value: Priority of requests that have none.
      abort_on_priority_when_disabled: Refuse a `priority` the policy does not look at.
      disable_radix_cache: Compute every prompt whole: no prefix cache.
      max_window_steps: Longest decode window, in steps.
      decode_buckets: Batch sizes decode windows are compiled for, ascending; chosen when None.
      prefill_buckets: Packed prefill lengths in tokens, ascending; chosen when None.
      max_top_logprobs: Most `top_logprobs_num` a request may ask for.
      hidden_layers: Layers whose hidden states `return_hidden_states` gives, counted as in
        transformers: 0 is the embeddings, i what comes out of layer i, `num_layers` that after the
        final norm. None is this last one alone, with no axis for layers.
      stream_interval: Tokens between two outputs of a stream, at least; the first comes at once.
      incremental_streaming_output: `text`, `output_ids` and what else an output of a stream has for
        every token hold what is new alone, as `delta_text` and `delta_ids` always do.
      random_seed: Seed from which requests without one draw theirs; fresh when None.
      preferred_sampling_params: Sampling parameters under those of a request, a dict or its JSON.
      sampling_defaults: "openai", SGLang's own defaults, which are what `sgl.Engine` uses whatever
        this says; "model" takes those of `generation_config.json` where it has some.
      chat_template: A Jinja template or the file of one, in place of the tokenizer's.
      hf_chat_template_name: Which of the tokenizer's templates, where it has several.
      allow_auto_truncate: Prompts that are too long lose their end instead of being refused.
      served_model_name: Name in outputs; `model_path` when None.
      weight_version: In `meta_info["weight_version"]` of outputs, until the weights are updated.
      trust_remote_code: Passed to transformers for the tokenizer.
      revision: Hub revision.
      download_dir: Hub cache folder.
      executable_cache: Keep compiled programs on disk.
      cache_dir: Where; `$XDG_CACHE_HOME/jaxengine` or `~/.cache/jaxengine` when None.
      progress: Progress bars while loading and compiling; None shows them on a terminal.
      log_level: Level of the "jaxengine" logger.
    """

    model_path: str = ""
    tokenizer_path: str | None = None
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    json_model_override_args: str | Mapping[str, Any] = "{}"
    dtype: str = "auto"
    context_length: int | None = None
    mem_fraction_static: float = 0.85
    max_running_requests: int | None = None
    max_queued_requests: int | None = None
    max_total_tokens: int | None = None
    page_size: int = 16
    chunked_prefill_size: int | None = None
    schedule_policy: str = "fcfs"
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    priority_scheduling_preemption_threshold: int = 10
    disable_priority_preemption: bool = False
    default_priority_value: int | None = None
    abort_on_priority_when_disabled: bool = False
    disable_radix_cache: bool = False
    max_window_steps: int = 32
    decode_buckets: tuple[int, ...] | None = None
    prefill_buckets: tuple[int, ...] | None = None
    max_top_logprobs: int = 20
    hidden_layers: tuple[int, ...] | None = None
    stream_interval: int = 1
    incremental_streaming_output: bool = False
    random_seed: int | None = None
    preferred_sampling_params: str | Mapping[str, Any] | None = None
    sampling_defaults: str = "openai"
    chat_template: str | None = None
    hf_chat_template_name: str | None = None
    allow_auto_truncate: bool = False
    served_model_name: str | None = None
    weight_version: str = "default"
    trust_remote_code: bool = False
    revision: str | None = None
    download_dir: str | None = None
    executable_cache: bool = True
    cache_dir: str | None = None
    progress: bool | None = None
    log_level: str = "error"
    ignored: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16", "half"))
        formats = ("auto", "safetensors", "orbax", "gguf", "dummy")
        _check_choice("load_format", self.load_format, formats)
        _check_choice("sampling_defaults", self.sampling_defaults, ("openai", "model"))
        _json_object("json_model_override_args", self.json_model_override_args)
        _json_object("preferred_sampling_params", self.preferred_sampling_params or {})
        for name in (
            "context_length",
            "max_running_requests",
            "max_total_tokens",
            "page_size",
            "max_window_steps",
            "max_top_logprobs",
            "stream_interval",
        ):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise ConfigError(f"`{name}` must be a positive integer, got {value!r}.")
        self._check_schedule()
        chunk = self.chunked_prefill_size
        if chunk is not None and (not _is_int(chunk) or (chunk < 1 and chunk != -1)):
            raise ConfigError(
                f"`chunked_prefill_size` must be a positive integer or -1 (whole prompts), "
                f"got {chunk!r}."
            )
        share = self.mem_fraction_static
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise ConfigError(f"`mem_fraction_static` must be a number in (0, 1), got {share!r}.")
        for name in ("decode_buckets", "prefill_buckets"):
            value = getattr(self, name)
            if value is not None and not _is_ascending(value):
                raise ConfigError(f"`{name}` must be ascending positive sizes, got {value!r}.")
        if self.hidden_layers is not None and not _is_list_of_ints(self.hidden_layers):
            raise ConfigError(
                f"`hidden_layers` must be numbers of layers, got {self.hidden_layers!r}."
            )
        seed = self.random_seed
        if seed is not None and (not _is_int(seed) or seed < 0):
            raise ConfigError(f"`random_seed` must be an integer, 0 or more, got {seed!r}.")

    @property
    def has_priorities(self) -> bool:
        """Priorities count."""
        return self.enable_priority_scheduling or self.schedule_policy == "priority"

    @property
    def model_overrides(self) -> dict[str, Any]:
        """`json_model_override_args` as a dict."""
        return _json_object("json_model_override_args", self.json_model_override_args)

    @property
    def preferred_params(self) -> dict[str, Any]:
        """`preferred_sampling_params` as a dict."""
        return _json_object("preferred_sampling_params", self.preferred_sampling_params or {})

    def _check_schedule(self) -> None:
        _check_choice("schedule_policy", self.schedule_policy, SCHEDULE_POLICIES)
        if self.enable_priority_scheduling and self.schedule_policy == "lpm":
            raise ConfigError(
                '`enable_priority_scheduling` and `schedule_policy="lpm"` are two orders; '
                "leave one of them out."
            )
        queued = self.max_queued_requests
        if queued is not None and (not _is_int(queued) or queued < 0):
            raise ConfigError(f"`max_queued_requests` must be 0 or more, got {queued!r}.")
        threshold = self.priority_scheduling_preemption_threshold
        if not _is_int(threshold) or threshold < 0:
            raise ConfigError(
                f"`priority_scheduling_preemption_threshold` must be 0 or more, got {threshold!r}."
            )
        priority = self.default_priority_value
        if priority is not None and not _is_int(priority):
            raise ConfigError(f"`default_priority_value` must be an integer, got {priority!r}.")

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> "EngineConfig":
        """Builds the config from `Engine(...)` keywords.

        Names of SGLang go through the table of `jaxengine.engine_arguments`: those that mean
        nothing here are ignored with one warning each.

        Raises:
          TypeError: For a name nobody knows, with the nearest one.
          ConfigError: For a value out of range, or a name that is refused.
        """
        fields = {f.name for f in dataclasses.fields(cls) if f.name != "ignored"}
        ours: dict[str, Any] = {}
        ignored = []
        for name, value in kwargs.items():
            known = ENGINE_ARGUMENTS.get(name)
            if name in fields:
                _set_once(ours, name, value)
            elif known is None:
                near = nearest(name, fields | ENGINE_ARGUMENTS.keys())
                raise TypeError(f"Engine() got an unexpected keyword argument `{name}`{near}")
            elif known.fate == "mapped":
                _set_once(ours, known.target, value)
            elif known.fate == "refused" and known.is_asked_for(value):
                raise ConfigError(f"`{name}` is not supported: {known.why}. Leave it out.")
            else:
                ignored.append(name)
                if known.fate == "ignored":
                    logger.warning("`%s` is ignored: %s.", name, known.why)
        return cls(**ours, ignored=tuple(ignored))

    @classmethod
    def from_toml(cls, path: str | Path) -> "EngineConfig":
        """Reads a preset of `configs/`: one file, one EngineConfig."""
        return cls.from_kwargs(tomllib.loads(Path(path).read_text()))

    def settings(self) -> dict[str, Any]:
        """What `from_kwargs` would build this config from."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.repr}

    def describe(self) -> str:
        """The resolved settings as one readable block, a line each."""
        rows = self.settings()
        width = max(map(len, rows))
        return "\n".join(f"  {name:<{width}} = {value}" for name, value in rows.items())


def _set_once(ours: dict[str, Any], name: str, value: Any) -> None:
    value = tuple(value) if isinstance(value, list) else value
    if name in ours and ours[name] != value:
        raise ConfigError(f"`{name}` is given under two names, as {ours[name]!r} and {value!r}.")
    ours[name] = value


def _json_object(name: str, value: object) -> dict[str, Any]:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ConfigError(f"`{name}` is no JSON: {error}.") from error
    if not isinstance(parsed, Mapping):
        raise ConfigError(f"`{name}` must be a dict or a JSON object, got {value!r}.")
    return dict(parsed)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of_ints(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_int, value))


def _is_ascending(value: Any) -> bool:
    return _is_list_of_ints(value) and bool(value) and list(value) == sorted({*value} - {0})


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.")
