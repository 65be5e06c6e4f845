"""The arguments of `generate`, checked and laid out as one request a prompt.

All of a call is checked before any of it is queued. Knows nothing of tokenising and of jax.
"""

import difflib
import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxengine import arguments
from jaxengine.errors import RequestError
from jaxengine.params import SamplingParams, parse_sampling_params
from jaxengine.types import Param

_UNSUPPORTED_ARGUMENTS: dict[str, Any] = dict.fromkeys(
    """
    audio_data bootstrap_host bootstrap_port bootstrap_room custom_logit_processor
    data_parallel_rank disagg_prefill_dp_rank external_trace_header image_data
    input_embeds kv_router_hint lora_path max_thinking_tokens mm_content_hashes mm_hashes
    modalities positional_embed_overrides require_reasoning return_flat_raw_top_logprobs
    return_hidden_states return_prompt_token_ids return_routed_experts return_sampling_mask
    routed_dp_rank session_id session_params video_data
    """.split()
) | {"routed_experts_start_len": 0}
"""SGLang's arguments whose feature does not exist here yet, and the number that asks for none."""

_ARGUMENTS = tuple(
    """
    cache_salt capture companions extra_key input_ids logprob_start_len on_error priority prompt
    return_logprob return_text_in_logprobs rid sampler sampling_params stream timeout_s
    token_ids_logprob top_logprobs_num
    """.split()
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRequest:
    """One prompt of a `generate` call.

    Attributes:
      index: Place of the prompt in its list.
      rid: Public id.
      text: The prompt, not empty; None when ids were given.
      input_ids: The prompt as int32 ids in the vocabulary, at least one; None when text was given.
      params: Checked; `stop` and `stop_token_ids` are tuples.
      values: The sampler's parameters by name, ready for the device.
      return_logprob: Output tokens carry their logprob.
      num_top_logprobs: Tokens that have one also carry those of this many most likely ones.
      logprob_ids: And those of these ids.
      logprob_start: Prompt tokens from here on have one, too; None for none.
      companions: Texts or ids of the prompts that are continued in lockstep.
      cache_namespace: Prefixes are shared only among those with the same one.
      priority: Who is more urgent; None where the caller does not say.
      timeout_s: Longest time until its end; None for no limit.
    """

    index: int
    rid: str
    text: str | None
    input_ids: np.ndarray | None
    params: SamplingParams
    values: Mapping[str, Any]
    return_logprob: bool = False
    num_top_logprobs: int = 0
    logprob_ids: tuple[int, ...] = ()
    logprob_start: int | None = None
    companions: tuple[str | np.ndarray, ...] = ()
    cache_namespace: Hashable = None
    priority: int | None = None
    timeout_s: float | None = None


class Refused(NamedTuple):
    """A prompt that is not queued, where the call wants errors among its outputs.

    Attributes:
      rid: Public id.
      error: Why not.
    """

    rid: str
    error: Exception


class ParsedCall(NamedTuple):
    """A checked `generate` call.

    Attributes:
      requests: One a prompt, in order.
      n: Samples a prompt; results are prompt-major.
      is_single: The result is one dict, not a list: one bare prompt and one sample.
      returns_errors: What fails becomes an output; nothing is raised for it.
    """

    requests: list[PromptRequest | Refused]
    n: int
    is_single: bool
    returns_errors: bool = False


def parse_call(
    prompt: Any,
    sampling_params: Any,
    input_ids: Any,
    *,
    return_logprob: Any = False,
    top_logprobs_num: Any = None,
    token_ids_logprob: Any = None,
    logprob_start_len: Any = None,
    companions: Any = None,
    cache_salt: Any = None,
    extra_key: Any = None,
    priority: Any = None,
    timeout_s: Any = None,
    on_error: Any = "raise",
    rid: Any = None,
    others: Mapping[str, Any],
    specs: Mapping[str, Param],
    vocab_size: int,
    max_top_logprobs: int,
    tokenizer: Any,
) -> ParsedCall:
    """Checks the arguments of one `generate` call, which may be of any type.

    Args:
      prompt: One text or a list of texts.
      sampling_params: One for all prompts, or a list with one a prompt.
      input_ids: Ids of one prompt, or a list of such; lists or numpy arrays.
      return_logprob: One for all, or a list.
      top_logprobs_num: One for all, or a list.
      token_ids_logprob: A list of ids for all, or a list of such lists.
      logprob_start_len: One for all, or a list; -1 or None for none.
      companions: A list of prompts for one bare prompt, else a list of such lists.
      cache_salt: One for all, or a list.
      extra_key: One for all, or a list.
      priority: One for all, or a list.
      timeout_s: One for all, or a list.
      on_error: "raise", or "return" to refuse bad prompts alone.
      rid: Public id or ids; one id and a list of prompts give `{rid}_{index}`. Fresh when None.
      others: Further keyword arguments of the call.
      specs: Parameters of the engine's sampler.
      vocab_size: Token ids are in [0, vocab_size).
      max_top_logprobs: Limit of `top_logprobs_num`.
      tokenizer: None when the engine has none.

    Raises:
      TypeError: For an argument or sampling parameter nobody knows, with the nearest name.
      RequestError: For anything else; it names the prompt by its index.
    """
    _check_others(others, specs)
    if on_error not in ("raise", "return"):
        raise RequestError(f'`on_error` must be "raise" or "return", got {on_error!r}.')
    if prompt is None and input_ids is None:
        raise RequestError("`prompt` or `input_ids` must be given.")
    if prompt is not None and input_ids is not None:
        raise RequestError("`prompt` and `input_ids` are both given; leave one of them out.")
    has_text = prompt is not None
    if prompt is not None:
        is_list = not isinstance(prompt, str)
        rows = arguments.texts(prompt, is_list, tokenizer)
    else:
        is_list = arguments.is_list_of_prompts(input_ids)
        rows = list(input_ids) if is_list else [input_ids]
    count = len(rows)
    rids = arguments.rids_of(rid, count, is_list)

    def spread(name: str, value: Any) -> list[Any]:
        return arguments.spread(name, value, count, is_list)

    wants_logprob = spread("return_logprob", return_logprob)
    tops = spread("top_logprobs_num", top_logprobs_num)
    starts = spread("logprob_start_len", logprob_start_len)
    salts, keys = spread("cache_salt", cache_salt), spread("extra_key", extra_key)
    priorities, timeouts = spread("priority", priority), spread("timeout_s", timeout_s)
    given = arguments.logprob_rows(token_ids_logprob, count, is_list)
    friends = arguments.companion_rows(companions, count, is_list)
    parse_params = functools.partial(
        parse_sampling_params, specs=specs, vocab_size=vocab_size, tokenizer=tokenizer
    )
    params = spread("sampling_params", sampling_params)
    # One for all is parsed once, and what is wrong with it is wrong with the call.
    is_shared = not isinstance(sampling_params, list | tuple)
    shared = parse_params(sampling_params, index=None) if is_shared else None

    def parse(i: int) -> PromptRequest:
        def place(name: str) -> str:
            return arguments.place_of(name, i, is_list)

        wants = arguments.flag(wants_logprob[i], place("return_logprob"))
        top = arguments.integer(tops[i], place("top_logprobs_num"), 0, max_top_logprobs)
        start = arguments.integer(starts[i], place("logprob_start_len"), -1, arguments.INT32_MAX)
        logprob_ids = arguments.logprob_ids(given[i], place("token_ids_logprob"), vocab_size)
        parsed = shared or parse_params(params[i], index=i)
        return PromptRequest(
            index=i,
            rid=rids[i],
            text=arguments.checked_text(rows[i], i, is_list) if has_text else None,
            input_ids=None
            if has_text
            else arguments.token_ids(rows[i], place("input_ids"), vocab_size),
            params=parsed.params,
            values=parsed.values,
            return_logprob=wants,
            # As in SGLang, `return_logprob` is what turns the others on.
            num_top_logprobs=(top or 0) * wants,
            logprob_ids=logprob_ids if wants else (),
            logprob_start=start if wants and start is not None and start >= 0 else None,
            companions=tuple(
                arguments.companion(friend, place("companions"), vocab_size, tokenizer)
                for friend in friends[i]
            ),
            cache_namespace=arguments.namespace(salts[i], keys[i], place),
            priority=arguments.integer(
                priorities[i], place("priority"), -arguments.INT32_MAX, arguments.INT32_MAX
            ),
            timeout_s=arguments.timeout(timeouts[i], place("timeout_s")),
        )

    requests: list[PromptRequest | Refused] = []
    for i in range(count):
        try:
            requests.append(parse(i))
        except RequestError as error:
            if on_error == "raise":
                raise
            requests.append(Refused(rids[i], error))
    n = shared.params.n if shared else _common_n(requests)
    return ParsedCall(requests, n, not is_list and n == 1, returns_errors=on_error == "return")


def group_size(prompt: Any, input_ids: Any, companions: Any) -> int:
    """Prompts that are continued in lockstep: one, and its companions."""
    is_list = (
        not isinstance(prompt, str)
        if prompt is not None
        else arguments.is_list_of_prompts(input_ids)
    )
    first = companions[0] if is_list and isinstance(companions, list | tuple) else companions
    return 1 + len(first) if isinstance(first, list | tuple) else 1


def _check_others(others: Mapping[str, Any], specs: Mapping[str, Param]) -> None:
    for name, value in others.items():
        if name in _UNSUPPORTED_ARGUMENTS:
            if not _asks_for_nothing(value, _UNSUPPORTED_ARGUMENTS[name]):
                raise RequestError(f"`{name}` is not supported by jaxengine yet; leave it out.")
            continue
        if name in specs or name in SamplingParams.__dataclass_fields__:
            hint = "; it is a sampling parameter: put it into `sampling_params`."
        elif near := difflib.get_close_matches(name, [*_ARGUMENTS, *_UNSUPPORTED_ARGUMENTS], 1):
            hint = f"; did you mean `{near[0]}`?"
        else:
            hint = "."
        raise TypeError(f"generate() got an unexpected keyword argument `{name}`{hint}")


def _asks_for_nothing(value: Any, default: Any) -> bool:
    if value is None or value is False:
        return True
    if isinstance(value, int) and not isinstance(value, bool):
        return value == default
    if isinstance(value, list | tuple):
        return all(_asks_for_nothing(item, default) for item in value)
    return isinstance(value, str | dict) and not value


def _common_n(requests: list[PromptRequest | Refused]) -> int:
    counts = {r.index: r.params.n for r in requests if isinstance(r, PromptRequest)}
    first = next(iter(counts.items()), (0, 1))
    for i, n in counts.items():
        if n != first[1]:
            raise RequestError(
                f"`n` must be the same for all prompts of a call; "
                f"it is {first[1]} for prompt {first[0]} and {n} for prompt {i}."
            )
    return first[1]
