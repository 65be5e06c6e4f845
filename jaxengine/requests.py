"""The arguments of `generate`, checked and laid out as one request a prompt.

All of a call is checked before any of it is queued. Knows nothing of tokenising and of jax.
"""

import functools
import reprlib
import uuid
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from jaxengine.compat import GENERATE_ARGUMENTS, SAMPLING_PARAMETERS, nearest
from jaxengine.errors import RequestError
from jaxengine.log import logger
from jaxengine.params import ParsedParams, SamplingParams, parse_sampling_params
from jaxengine.types import MAX_LOGPROB_IDS, HiddenFormat, HiddenStates, Param

_OWN_ARGUMENTS = ("capture", "companions", "hidden_states_format", "sampler")
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
      cache_namespace: Only prompts with the same one share their prefixes.
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


class ParsedCall(NamedTuple):
    """A checked `generate` call.

    Attributes:
      requests: One a prompt, in order.
      n: Samples a prompt; results are prompt-major.
      is_single: The result is one dict, not a list: one bare prompt and one sample.
    """

    requests: list[PromptRequest]
    n: int
    is_single: bool


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
    texts, ids, embeds, is_list = _prompts(
        prompt, input_ids, input_embeds, vocab_size, hidden_size, tokenizer
    )
    count = len(texts)
    rids = _rids(rid, count, is_list)
    wants_logprob = _flags("return_logprob", return_logprob, count, is_list)
    parsed = _parsed_params(sampling_params, count, is_list, specs, vocab_size, tokenizer)
    n = _common_n(parsed)
    tops = _integers("top_logprobs_num", top_logprobs_num, count, is_list, 0, max_top_logprobs)
    starts = _integers("logprob_start_len", logprob_start_len, count, is_list, -1, 2**31 - 1)
    given = _logprob_ids(token_ids_logprob, count, is_list, vocab_size)
    friends = _companions(companions, count, is_list, vocab_size, tokenizer)
    hidden = _hidden_states(return_hidden_states, count, is_list)
    _check_choice("hidden_states_format", hidden_states_format, ("numpy", "sglang"))
    if input_embeds is not None and (companions is not None or max(starts, default=-1) >= 0):
        raise RequestError(
            "`input_embeds` have no token ids, so they go neither with `companions` nor with "
            "`logprob_start_len`; pass `input_ids`, or leave these out."
        )
    requests = [
        PromptRequest(
            index=i,
            seed_key=i if seed_key is None else seed_key,
            rid=rids[i],
            text=texts[i],
            input_ids=ids[i],
            params=parsed[i].params,
            values=parsed[i].values,
            return_logprob=wants_logprob[i],
            # As in SGLang, `return_logprob` is what turns the others on.
            num_top_logprobs=tops[i] * wants_logprob[i],
            logprob_ids=given[i] if wants_logprob[i] else (),
            logprob_start=starts[i] if wants_logprob[i] and starts[i] >= 0 else None,
            companions=friends[i],
            hidden_states=hidden[i],
            hidden_format=hidden_states_format,
            embeds=embeds[i],
            has_prompt_ids=bool(return_prompt_token_ids),
            # What came of embeddings is found by samples of the same prompt, and nobody else.
            cache_namespace=None if embeds[i] is None else object(),
        )
        for i in range(count)
    ]
    return ParsedCall(requests, n, is_single=not is_list and n == 1)


def group_size(prompt: Any, input_ids: Any, companions: Any) -> int:
    """Prompts that are continued in lockstep: one, and its companions."""
    if prompt is None and input_ids is None:
        return 1
    is_list = not isinstance(prompt, str) if prompt is not None else _is_list_of_prompts(input_ids)
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


def _place(name: str, index: int, is_list: bool) -> str:
    return f"`{name}` of prompt {index}" if is_list else f"`{name}`"


def _prompts(
    prompt: Any,
    input_ids: Any,
    input_embeds: Any,
    vocab_size: int,
    hidden_size: int,
    tokenizer: Any,
) -> tuple[list[Any], list[Any], list[Any], bool]:
    """Texts, ids and embeddings of the prompts, None where they have none; whether it is a list."""
    given = {"prompt": prompt, "input_ids": input_ids, "input_embeds": input_embeds}
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if not names:
        raise RequestError("`prompt`, `input_ids` or `input_embeds` must be given.")
    if len(names) > 1:
        listed = " and ".join(names)
        raise RequestError(
            f"{listed} are {'both ' * (len(names) == 2)}given; leave all but one out."
        )
    if prompt is not None:
        is_list = not isinstance(prompt, str)
        texts = _texts(prompt, is_list, tokenizer)
        return texts, [None] * len(texts), [None] * len(texts), is_list
    if input_ids is not None:
        is_list = _is_list_of_prompts(input_ids)
        ids = _id_rows(input_ids, is_list, vocab_size)
        return [None] * len(ids), ids, [None] * len(ids), is_list
    embeds, is_list = _embeds(input_embeds, hidden_size)
    return [None] * len(embeds), [np.full(len(x), -1, np.int32) for x in embeds], embeds, is_list


def _embeds(value: Any, hidden_size: int) -> tuple[list[np.ndarray], bool]:
    """Float32 [tokens, D] of every prompt, and whether there is a list of them."""

    def depth(x: Any) -> int:
        if hasattr(x, "ndim"):
            return x.ndim
        return 1 + depth(x[0]) if isinstance(x, list | tuple) and x else 0

    is_list = depth(value) == 3 or (isinstance(value, list | tuple) and not value)
    rows = []
    for i, row in enumerate(value if is_list else [value]):
        try:
            array = np.asarray(row, np.float32)
        except (TypeError, ValueError) as error:
            raise RequestError(f"{_place('input_embeds', i, is_list)}: {error}.") from None
        if array.ndim != 2 or not len(array) or array.shape[1] != hidden_size:
            raise RequestError(
                f"{_place('input_embeds', i, is_list)} must be an array [tokens, {hidden_size}] "
                f"with at least one token, got shape {array.shape}."
            )
        if not np.isfinite(array).all():
            raise RequestError(f"{_place('input_embeds', i, is_list)} must be finite.")
        rows.append(array)
    return rows, is_list


def _hidden_states(value: Any, count: int, is_list: bool) -> list[HiddenStates | None]:
    kinds: dict[Any, HiddenStates | None] = {
        None: None,
        False: None,
        True: "all",
        "last": "last",
        "mean": "mean",
    }
    wanted = _spread("return_hidden_states", value, count, is_list)
    for i, kind in enumerate(wanted):
        if not isinstance(kind, Hashable) or kind not in kinds:
            place = _place("return_hidden_states", i, is_list)
            raise RequestError(f'{place} must be True, False, "last" or "mean", got {kind!r}.')
    return [kinds[kind] for kind in wanted]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RequestError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def _texts(prompt: Any, is_list: bool, tokenizer: Any) -> list[str]:
    prompts = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    prompts = prompts if is_list else [prompts]
    if not isinstance(prompts, list | tuple):
        got = type(prompt).__name__
        raise RequestError(f"`prompt` must be a string or a list of strings, got {got}.")
    for i, text in enumerate(prompts):
        place = f"Prompt {i}" if is_list else "`prompt`"
        if not isinstance(text, str):
            remedy = " Token ids go into `input_ids`." if isinstance(text, Integral | list) else ""
            raise RequestError(f"{place} must be a string, got {type(text).__name__}.{remedy}")
        if not text:
            raise RequestError(f"{place} is empty; it needs at least one character.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"at character {error.start}"
            raise RequestError(f"{place} holds half a surrogate pair {where}.") from None
    if tokenizer is None and prompts:
        raise RequestError(
            "`prompt` needs a tokenizer, and this engine was made with skip_tokenizer_init=True. "
            "Pass `input_ids`, or make the engine with a tokenizer."
        )
    return list(prompts)


def _is_list_of_prompts(input_ids: Any) -> bool:
    if hasattr(input_ids, "ndim"):
        return input_ids.ndim > 1
    if not isinstance(input_ids, list | tuple):
        got = type(input_ids).__name__
        raise RequestError(f"`input_ids` must be a list of ids or a list of such lists, got {got}.")
    return len(input_ids) > 0 and (
        isinstance(input_ids[0], list | tuple) or getattr(input_ids[0], "ndim", 0) > 0
    )


def _id_rows(input_ids: Any, is_list: bool, vocab_size: int) -> list[np.ndarray]:
    rows = input_ids if is_list else [input_ids]
    return [
        _token_ids(row, _place("input_ids", i, is_list), vocab_size) for i, row in enumerate(rows)
    ]


def _token_ids(ids: Any, place: str, vocab_size: int) -> np.ndarray:
    if hasattr(ids, "ndim"):
        array = np.asarray(ids)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            got = f"shape {array.shape} and dtype {array.dtype}"
            raise RequestError(f"{place} must be a row of integers, got an array of {got}.")
        ids = array.tolist()
    if not isinstance(ids, list | tuple):
        raise RequestError(f"{place} must be a list of ids, got {type(ids).__name__}.")
    if not ids:
        raise RequestError(f"{place} is empty; a prompt needs at least one token.")
    if set(map(type, ids)) != {int}:
        for position, token_id in enumerate(ids):
            if not isinstance(token_id, Integral) or isinstance(token_id, bool):
                got = f"{reprlib.repr(token_id)} at position {position}"
                raise RequestError(f"{place} must hold integers only, got {got}.")
    if min(ids) < 0 or max(ids) >= vocab_size:
        position, bad = next((i, t) for i, t in enumerate(ids) if not 0 <= t < vocab_size)
        got = f"got {bad} at position {position}"
        raise RequestError(f"{place} must be in the vocabulary, [0, {vocab_size}); {got}.")
    return np.array(ids, np.int32)


def _flags(name: str, value: Any, count: int, is_list: bool) -> list[bool]:
    flags = _spread(name, value, count, is_list)
    for i, flag in enumerate(flags):
        if not isinstance(flag, bool | np.bool_):
            place = _place(name, i, is_list)
            raise RequestError(f"{place} must be True or False, got {flag!r}.")
    return [bool(flag) for flag in flags]


def _integers(name: str, value: Any, count: int, is_list: bool, low: int, high: int) -> list[int]:
    numbers = [min(low, 0) if v is None else v for v in _spread(name, value, count, is_list)]
    for i, number in enumerate(numbers):
        is_int = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not is_int or not low <= number <= high:
            place = _place(name, i, is_list)
            raise RequestError(f"{place} must be an integer in [{low}, {high}], got {number!r}.")
    return [int(number) for number in numbers]


def _logprob_ids(value: Any, count: int, is_list: bool, vocab_size: int) -> list[tuple[int, ...]]:
    if value is None or len(value) == 0:
        return [()] * count
    nested = [isinstance(item, list | tuple | np.ndarray) or item is None for item in value]
    rows = list(value) if any(nested) else [value] * count
    if any(nested) and (not is_list or len(rows) != count):
        raise RequestError(f"`token_ids_logprob` has {len(rows)} lists for {count} prompts.")
    ids = []
    for i, row in enumerate(rows):
        place = _place("token_ids_logprob", i, is_list)
        row_ids = [] if row is None or len(row) == 0 else _token_ids(row, place, vocab_size)
        if len(row_ids) > MAX_LOGPROB_IDS:
            raise RequestError(f"{place} has {len(row_ids)} ids; the limit is {MAX_LOGPROB_IDS}.")
        ids.append(tuple(int(token_id) for token_id in row_ids))
    return ids


def _companions(
    value: Any, count: int, is_list: bool, vocab_size: int, tokenizer: Any
) -> list[tuple[str | np.ndarray, ...]]:
    """The companions of every prompt; all prompts have equally many."""
    if value is None:
        return [()] * count
    rows = value if is_list else [value]
    if not isinstance(rows, list | tuple) or len(rows) != count:
        raise RequestError(f"`companions` must hold one list of prompts for each of {count}.")
    parsed = []
    for i, row in enumerate(rows):
        place = _place("companions", i, is_list)
        if not isinstance(row, list | tuple) or len(row) != len(rows[0]) or not row:
            raise RequestError(
                f"{place} must be a list of prompts, as many for every prompt and at least one."
            )
        parsed.append(
            tuple(
                _texts(item, False, tokenizer)[0]
                if isinstance(item, str)
                else _token_ids(item, place, vocab_size)
                for item in row
            )
        )
    return parsed


def _spread(name: str, value: Any, count: int, is_list: bool) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if not is_list:
        raise RequestError(f"`{name}` is a list, but there is one bare prompt; pass a list of one.")
    if len(value) != count:
        raise RequestError(f"`{name}` has {len(value)} entries for {count} prompts.")
    return list(value)


def _rids(rid: Any, count: int, is_list: bool) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(rid, str) and rid and is_list:
        return [f"{rid}_{i}" for i in range(count)]
    rids = _spread("rid", rid, count, is_list)
    first: dict[str, int] = {}
    for i, name in enumerate(rids):
        if not isinstance(name, str) or not name:
            place = _place("rid", i, is_list)
            raise RequestError(f"{place} must be a string that is not empty, got {name!r}.")
        if first.setdefault(name, i) != i:
            raise RequestError(f"`rid` {name!r} is given to prompts {first[name]} and {i}.")
    return rids


def _parsed_params(
    sampling_params: Any,
    count: int,
    is_list: bool,
    specs: Mapping[str, Param],
    vocab_size: int,
    tokenizer: Any,
) -> list[ParsedParams]:
    def parse(raw: Any, index: int | None) -> ParsedParams:
        return parse_sampling_params(
            raw, specs, index=index, vocab_size=vocab_size, tokenizer=tokenizer
        )

    rows = _spread("sampling_params", sampling_params, count, is_list)
    if isinstance(sampling_params, list | tuple):
        return [parse(raw, i) for i, raw in enumerate(rows)]
    return [parse(sampling_params, None)] * count


def _common_n(parsed: list[ParsedParams]) -> int:
    counts = [p.params.n for p in parsed] or [1]
    for i, n in enumerate(counts):
        if n != counts[0]:
            raise RequestError(
                f"`n` must be the same for all prompts of a call; "
                f"it is {counts[0]} for prompt 0 and {n} for prompt {i}."
            )
    return counts[0]
