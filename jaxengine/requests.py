"""The arguments of `generate`, checked and laid out as one request a prompt.

All of a call is checked before any of it is queued. Knows nothing of tokenising and of jax.
"""

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxengine import arguments
from jaxengine.compat import GENERATE_ARGUMENTS, SAMPLING_PARAMETERS, nearest
from jaxengine.errors import RequestError
from jaxengine.log import logger
from jaxengine.params import SamplingParams, parse_sampling_params
from jaxengine.types import HiddenFormat, HiddenStates, Param

_OWN_ARGUMENTS = (
    "capture",
    "companions",
    "hidden_states_format",
    "on_error",
    "sampler",
    "timeout_s",
)
"""Arguments SGLang does not have."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRequest:
    """One prompt of a `generate` call.

    Attributes:
      index: Place of the prompt in its list.
      seed_key: What its seed is derived from beside the call's.
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
      hidden_states: Which hidden states are reported, if any.
      hidden_format: In which form.
      embeds: Float32 [tokens, D] in place of ids, which are all -1 then.
      has_prompt_ids: Outputs carry the prompt's ids.
      cache_namespace: Prefixes are shared only among those with the same one.
      priority: Who is more urgent; None where the caller does not say.
      timeout_s: Longest time until its end; None for no limit.
    """

    index: int
    seed_key: int | str
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
    hidden_states: HiddenStates | None = None
    hidden_format: HiddenFormat = "numpy"
    embeds: np.ndarray | None = None
    has_prompt_ids: bool = False
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
    input_embeds: Any = None,
    return_hidden_states: Any = False,
    hidden_states_format: Any = "numpy",
    return_prompt_token_ids: Any = False,
    cache_salt: Any = None,
    extra_key: Any = None,
    priority: Any = None,
    timeout_s: Any = None,
    on_error: Any = "raise",
    rid: Any = None,
    seed_key: int | str | None = None,
    others: Mapping[str, Any],
    specs: Mapping[str, Param],
    vocab_size: int,
    hidden_size: int,
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
      input_embeds: Embeddings [tokens, D] of one prompt instead of ids, or a list of such.
      return_hidden_states: True, "last", "mean" or False; one for all, or a list.
      hidden_states_format: "numpy" or "sglang".
      return_prompt_token_ids: Outputs carry the prompt's ids.
      cache_salt: One for all, or a list.
      extra_key: One for all, or a list.
      priority: One for all, or a list.
      timeout_s: One for all, or a list.
      on_error: "raise", or "return" to refuse bad prompts alone.
      rid: Public id or ids; one id and a list of prompts give `{rid}_{index}`. Fresh when None.
      seed_key: Of the one prompt, where it is one of a stream; its index when None.
      others: Further keyword arguments of the call.
      specs: Parameters of the engine's sampler.
      vocab_size: Token ids are in [0, vocab_size).
      hidden_size: Width of an embedding.
      max_top_logprobs: Limit of `top_logprobs_num`.
      tokenizer: None when the engine has none.

    Raises:
      TypeError: For an argument or sampling parameter nobody knows, with the nearest name.
      RequestError: For anything else; it names the prompt by its index.
    """
    _check_others(others, specs)
    if prompt is not None and input_ids is not None and tokenizer is None:
        # Ray's stage for SGLang sends both; without a tokenizer only the ids can be meant.
        prompt = None
    arguments.choice("on_error", on_error, ("raise", "return"))
    arguments.choice("hidden_states_format", hidden_states_format, ("numpy", "sglang"))
    kind, rows, is_list = _rows(prompt, input_ids, input_embeds, tokenizer)
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
    hidden = spread("return_hidden_states", return_hidden_states)
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
        text, ids, embeds = None, None, None
        if kind == "prompt":
            text = arguments.checked_text(rows[i], i, is_list)
        elif kind == "input_ids":
            ids = arguments.token_ids(rows[i], place(kind), vocab_size)
        else:
            embeds = arguments.embeds(rows[i], place(kind), hidden_size)
            ids = np.full(len(embeds), -1, np.int32)
            _check_goes_with_embeds(friends[i], start)
        return PromptRequest(
            index=i,
            seed_key=i if seed_key is None else seed_key,
            rid=rids[i],
            text=text,
            input_ids=ids,
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
            hidden_states=arguments.hidden_states(hidden[i], place("return_hidden_states")),
            hidden_format=hidden_states_format,
            embeds=embeds,
            has_prompt_ids=bool(return_prompt_token_ids),
            cache_namespace=arguments.namespace(salts[i], keys[i], place)
            # What came of embeddings is found by samples of the same prompt, and nobody else.
            if embeds is None
            else object(),
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
    if prompt is None and input_ids is None:
        return 1
    is_list = not isinstance(prompt, str)
    if prompt is None:
        is_list = arguments.is_list_of_prompts(input_ids)
    first = companions[0] if is_list and isinstance(companions, list | tuple) else companions
    return 1 + len(first) if isinstance(first, list | tuple) else 1


def _check_others(others: Mapping[str, Any], specs: Mapping[str, Param]) -> None:
    for name, value in others.items():
        known = GENERATE_ARGUMENTS.get(name)
        if known is None or known.fate == "honoured":
            if name in specs or name in SAMPLING_PARAMETERS:
                hint = "; it is a sampling parameter: put it into `sampling_params`."
            else:
                hint = nearest(name, (*_OWN_ARGUMENTS, *GENERATE_ARGUMENTS))
            raise TypeError(f"generate() got an unexpected keyword argument `{name}`{hint}")
        if known.fate == "ignored":
            _warn_once(name, known.why)
        elif known.is_asked_for(value):
            raise RequestError(f"`{name}` is not supported: {known.why}. Leave it out.")


@functools.cache
def _warn_once(name: str, why: str) -> None:
    logger.warning("`%s` is ignored: %s.", name, why)


def _rows(
    prompt: Any, input_ids: Any, input_embeds: Any, tokenizer: Any
) -> tuple[str, list[Any], bool]:
    """Which argument the prompts are given in, one entry a prompt, and whether it is a list."""
    given = {"prompt": prompt, "input_ids": input_ids, "input_embeds": input_embeds}
    names = [name for name, value in given.items() if value is not None]
    if not names:
        raise RequestError("`prompt`, `input_ids` or `input_embeds` must be given.")
    if len(names) > 1:
        listed = " and ".join(f"`{name}`" for name in names)
        raise RequestError(
            f"{listed} are {'both ' * (len(names) == 2)}given; leave all but one out."
        )
    [kind] = names
    if kind == "prompt":
        is_list = not isinstance(prompt, str)
        return kind, arguments.texts(prompt, is_list, tokenizer), is_list
    of_many = arguments.is_list_of_prompts if kind == "input_ids" else arguments.is_list_of_embeds
    is_list = of_many(given[kind])
    return kind, list(given[kind]) if is_list else [given[kind]], is_list


def _check_goes_with_embeds(companions: Any, logprob_start: int | None) -> None:
    if companions or (logprob_start is not None and logprob_start >= 0):
        raise RequestError(
            "`input_embeds` have no token ids, so they go neither with `companions` nor with "
            "`logprob_start_len`; pass `input_ids`, or leave these out."
        )


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
