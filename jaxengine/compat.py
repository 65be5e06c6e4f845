"""What becomes of every name of SGLang here: the one table, read wherever a name is met.

Here are the names around a call; those of an engine's settings are in `engine_arguments.py`.

A name is honoured, mapped to ours, ignored with a warning, or refused with the reason; a refused
one may still be given where its value asks for nothing. No other name is known.

Source: `ServerArgs` of SGLang 0.5 as its offline engine documentation prints them; `Engine` and
`SamplingParams` of its main branch in 2026.
"""

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Fate = Literal["honoured", "mapped", "ignored", "refused"]


class Name(NamedTuple):
    """What becomes of a name.

    Attributes:
      fate: "honoured", "mapped", "ignored" (with a warning) or "refused".
      why: Of an ignored or refused name; a clause that ends its message.
      target: Ours, of a mapped name.
      off: A value of a refused name that asks for nothing, beside None, False, 0 and what is empty.
    """

    fate: Fate
    why: str = ""
    target: str = ""
    off: Any = None

    def is_asked_for(self, value: Any) -> bool:
        """Whether a value of a refused name asks for what is not there."""
        if isinstance(value, list | tuple):
            return any(self.is_asked_for(item) for item in value)
        if isinstance(value, str | dict):
            return bool(value) and value != self.off
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value not in (0, self.off)
        return value is not None and value is not False


def honoured(names: str) -> dict[str, Name]:
    """Names that do here what they do there."""
    return {name: Name("honoured") for name in names.split()}


def mapped(**targets: str) -> dict[str, Name]:
    """Names that are called otherwise here."""
    return {name: Name("mapped", target=target) for name, target in targets.items()}


def ignored(why: str, names: str) -> dict[str, Name]:
    """Names without meaning here; results are the same without them."""
    return {name: Name("ignored", why) for name in names.split()}


def refused(why: str, names: str, off: Any = None) -> dict[str, Name]:
    """Names that would change results or memory if they were ignored."""
    return {name: Name("refused", why, off=off) for name in names.split()}


def table(*parts: Mapping[str, Name]) -> Mapping[str, Name]:
    """One mapping of all parts; no name may be in two."""
    names: dict[str, Name] = {}
    for part in parts:
        assert not names.keys() & part.keys(), f"twice: {sorted(names.keys() & part.keys())}"
        names |= part
    return MappingProxyType(names)


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest one, where one is near."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean `{near[0]}`?" if near else "."


NO_MOE = "there are no experts: models here are dense"
NO_MEDIA = "models here take text; media in a request are refused"
ONE_DEVICE = "an engine uses one device; run one engine a GPU"
XLA = "XLA compiles all of the step, so there is nothing to choose"
NO_LORA = "LoRA adapters are not there yet; merge the adapter into the weights"
NO_GRAMMAR = "structured output is not there yet"
NO_PD = "prefill and decode run in one engine"
NO_SESSIONS = "there are no sessions: the prefix cache finds earlier turns by their tokens"
STATS = "`stats()` has the counts"

GENERATE_ARGUMENTS = table(
    honoured(
        """
        cache_salt custom_logit_processor extra_key input_embeds input_ids logprob_start_len
        priority prompt return_hidden_states return_logprob return_prompt_token_ids
        return_text_in_logprobs rid sampling_params stream token_ids_logprob top_logprobs_num
        """
    ),
    ignored("no trace is kept, and nothing is routed", "external_trace_header kv_router_hint"),
    refused(
        NO_MEDIA,
        """
        audio_data image_data mm_content_hashes mm_hashes modalities positional_embed_overrides
        video_data
        """,
    ),
    refused(NO_LORA, "lora_path"),
    refused(NO_MOE, "return_routed_experts routed_experts_start_len"),
    refused(NO_PD, "bootstrap_host bootstrap_port bootstrap_room disagg_prefill_dp_rank"),
    refused(ONE_DEVICE, "data_parallel_rank routed_dp_rank"),
    refused(NO_SESSIONS, "session_id session_params"),
    refused(
        "a sampler can do it: see `jaxengine.sampling`", "max_thinking_tokens require_reasoning"
    ),
    refused(
        "`top_logprobs_num` and `capture` report what a step computed",
        "return_flat_raw_top_logprobs return_sampling_mask",
    ),
)
"""Every argument of `sgl.Engine.generate`, and every field of its `GenerateReqInput`."""

SAMPLING_PARAMETERS = table(
    honoured(
        """
        frequency_penalty ignore_eos logit_bias max_new_tokens min_new_tokens min_p n no_stop_trim
        presence_penalty repetition_penalty skip_special_tokens spaces_between_special_tokens stop
        stop_regex stop_token_ids stream_interval temperature top_k top_p
        """
    ),
    mapped(custom_params="custom", sampling_seed="seed"),
    refused(NO_GRAMMAR, "ebnf json_schema regex structural_tag"),
    refused("beam search is not there", "beam_width"),
)
"""Every sampling parameter of SGLang."""

METHODS = table(
    honoured(
        """
        abort_request async_encode async_generate async_score continue_generation encode
        flush_cache generate get_all_child_pids get_model_info pause_generation
        get_server_info get_weights_by_name release_memory_occupation resume_memory_occupation score
        shutdown start_profile stop_profile update_weights_from_disk update_weights_from_tensor
        """
    ),
    mapped(server_args="config"),
    refused("a cross-encoder is not among the models here; `score` compares labels", "rerank"),
    refused(NO_SESSIONS, "close_session open_session"),
    refused(
        NO_MOE,
        """
        dump_expert_distribution_record start_expert_distribution_record
        stop_expert_distribution_record
        """,
    ),
    refused(
        "weights are not sent between processes: train in this one and pass the arrays to "
        "`update_weights`, or write a checkpoint and pass its folder",
        """
        destroy_weights_update_group init_weights_update_group update_weights_from_distributed
        update_weights_from_ipc
        """,
    ),
    refused(
        "`update_weights` does it all: it checks, changes all or nothing, and sets the version",
        "begin_weight_update check_weights end_weight_update update_weight_version",
    ),
    refused(
        NO_LORA,
        """
        async_load_lora_adapter async_unload_lora_adapter load_lora_adapter
        load_lora_adapter_from_tensors unload_lora_adapter
        """,
    ),
    refused("call `gc.freeze()`: there is one process", "freeze_gc"),
    refused("there are no other processes to call", "collective_rpc"),
    refused("save `params` with Orbax or safetensors", "save_remote_model save_sharded_model"),
    refused(STATS, "get_loads"),
    refused("settings are fixed: make another Engine", "configure_logging set_internal_state"),
    refused(
        "the Engine itself has `tokenizer`, `abort` and what else they are used for",
        "loop port_args template_manager tokenizer_manager",
    ),
)
"""Every method of `sgl.Engine` and its tokenizer manager, and attributes that people reach for."""
