"""The arguments of `generate`, checked and laid out as one request a prompt.

All of a call is checked before any of it is queued. Knows nothing of tokenising and of jax.
"""

import dataclasses
import functools
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxengine import arguments as checks
from jaxengine.compat import GENERATE_ARGUMENTS, SAMPLING_PARAMETERS, nearest
from jaxengine.errors import RequestError
from jaxengine.generate_arguments import DEFAULTS
from jaxengine.log import logger
from jaxengine.params import HostParams, ParamsParser, SamplingParams
from jaxengine.types import HiddenFormat, HiddenStates, Param

_ONE_A_PROMPT = (
    "cache_salt",
    "extra_key",
    "logprob_start_len",
    "priority",
    "return_hidden_states",
    "return_logprob",
    "timeout_s",
    "top_logprobs_num",
)
"""Arguments beside `sampling_params` of which there is one for all prompts, or a list with one a
prompt."""


class PromptRequest(NamedTuple):
    """One prompt of a `generate` call.

    Attributes:
      index: Place of the prompt in its list.
      seed_key: What its seed is derived from beside the call's.
      rid: Public id.
      text: The prompt, not empty; None when ids were given.
      input_ids: The prompt as int32 ids in the vocabulary, at least one; None when text was given.
      params: Those sampling parameters that the host acts on.
      values: Those of the sampler that are given, by name, ready for the device.
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
    params: HostParams
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
      is_streaming: Outputs are given as they grow.
      has_text: Lists of logprobs carry the tokens' text.
      returns_errors: What fails becomes an output; nothing is raised for it.
    """

    requests: list[PromptRequest | Refused]
    n: int
    is_single: bool
    is_streaming: bool = False
    has_text: bool = False
    returns_errors: bool = False


def parse_call(
    arguments: Mapping[str, Any],
    *,
    seed_key: int | str | None = None,
    parser: ParamsParser,
    hidden_size: int,
    max_top_logprobs: int,
) -> ParsedCall:
    """Checks the arguments of one `generate` call, which may be of any type.

    Args:
      arguments: By name, as `Engine.generate` explains them; those that are not there have their
        defaults.
      seed_key: Of the one prompt, where it is one of a stream; its index when None.
      parser: For parameters of the call's sampler.
      hidden_size: Width of an embedding.
      max_top_logprobs: Limit of `top_logprobs_num`.

    Raises:
      TypeError: For an argument or sampling parameter nobody knows, with the nearest name.
      RequestError: For anything else; it names the prompt by its index.
    """
    given = {**DEFAULTS, **arguments}
    _check_others({k: v for k, v in arguments.items() if k not in DEFAULTS}, parser.specs)
    if given["input_ids"] is not None and parser.tokenizer is None:
        # Ray's stage for SGLang sends both; without a tokenizer only the ids can be meant.
        given["prompt"] = None
    on_error = given["on_error"]
    checks.choice("on_error", on_error, ("raise", "return"))
    checks.choice("hidden_states_format", given["hidden_states_format"], ("numpy", "sglang"))
    limits = _Limits(parser.vocab_size, hidden_size, max_top_logprobs)
    prompts = _Prompts(given, seed_key, limits, parser)
    requests: list[PromptRequest | Refused] = []
    for i, rid in enumerate(prompts.rids):
        try:
            requests.append(prompts.request(i))
        except RequestError as error:
            if on_error == "raise":
                raise
            requests.append(Refused(rid, error))
    n = prompts.shared.params.n if prompts.shared else _common_n(requests)
    return ParsedCall(
        requests,
        n,
        is_single=not prompts.is_list and n == 1,
        is_streaming=bool(given["stream"]),
        has_text=bool(given["return_text_in_logprobs"]),
        returns_errors=on_error == "return",
    )


class _Limits(NamedTuple):
    """What values are checked against; see `parse_call`."""

    vocab_size: int
    hidden_size: int
    max_top_logprobs: int


class _Prompts:
    """The prompts of one call, laid out: what is wrong with the layout is wrong with the call."""

    def __init__(
        self,
        given: Mapping[str, Any],
        seed_key: int | str | None,
        limits: _Limits,
        parser: ParamsParser,
    ) -> None:
        self._given, self._seed_key = given, seed_key
        self._limits, self._parser = limits, parser
        self._kind, self._rows, self.is_list = _rows(given, parser.tokenizer)
        count = len(self._rows)
        self.rids = checks.rids_of(given["rid"], count, self.is_list)
        params = given["sampling_params"]
        self._params = checks.spread("sampling_params", params, count, self.is_list)
        self._each = {
            name: checks.spread(name, given[name], count, self.is_list) for name in _ONE_A_PROMPT
        }
        ids = given["token_ids_logprob"]
        self._each["token_ids_logprob"] = checks.logprob_rows(ids, count, self.is_list)
        self._friends = checks.companion_rows(given["companions"], count, self.is_list)
        # One for all is checked once, and what is wrong with it is wrong with the call.
        self.shared = None if _is_row(params) else parser.parse(params, None)
        has_rows = any(_is_row(given[name]) for name in self._each)
        self._settings = None if has_rows else self._checked({n: given[n] for n in self._each})

    def request(self, i: int) -> PromptRequest:
        """One of them, checked."""
        parsed = self.shared or self._parser.parse(self._params[i], i)
        text, ids, embeds = self._content(i)
        settings = self._settings
        if settings is None:
            settings = self._checked({name: each[i] for name, each in self._each.items()}, i)
        request = PromptRequest(
            index=i,
            seed_key=i if self._seed_key is None else self._seed_key,
            rid=self.rids[i],
            text=text,
            input_ids=ids,
            params=parsed.params,
            values=parsed.values,
            companions=self._companions(i) if self._friends[i] else (),
            embeds=embeds,
            **settings,
        )
        # What came of embeddings is found by samples of the same prompt, and nobody else.
        return request if embeds is None else request._replace(cache_namespace=object())

    def _place(self, name: str, i: int) -> str:
        return checks.place_of(name, i, self.is_list)

    def _checked(self, asked: Mapping[str, Any], i: int | None = None) -> dict[str, Any]:
        """What is asked of one prompt, or of all of them; as in SGLang, `return_logprob` is what
        turns all that is about logprobs on."""

        def place(name: str) -> str:
            return f"`{name}`" if i is None else self._place(name, i)

        def integer(name: str, low: int, high: int = checks.INT32_MAX) -> int | None:
            return checks.integer(asked[name], place(name), low, high)

        salt, key = asked["cache_salt"], asked["extra_key"]
        wants = checks.flag(asked["return_logprob"], place("return_logprob"))
        top = integer("top_logprobs_num", 0, self._limits.max_top_logprobs)
        start = integer("logprob_start_len", -1)
        listed, vocab_size = asked["token_ids_logprob"], self._limits.vocab_size
        ids = checks.logprob_ids(listed, place("token_ids_logprob"), vocab_size)
        return {
            "return_logprob": wants,
            "num_top_logprobs": (wants and top) or 0,
            "logprob_ids": ids if wants else (),
            "logprob_start": start if wants and start is not None and start >= 0 else None,
            "hidden_states": checks.hidden_states(
                asked["return_hidden_states"], place("return_hidden_states")
            ),
            "hidden_format": self._given["hidden_states_format"],
            "has_prompt_ids": bool(self._given["return_prompt_token_ids"]),
            "cache_namespace": checks.namespace(salt, key, place),
            "priority": integer("priority", -checks.INT32_MAX),
            "timeout_s": checks.timeout(asked["timeout_s"], place("timeout_s")),
        }

    def _content(self, i: int) -> tuple[str | None, np.ndarray | None, np.ndarray | None]:
        """The prompt's text, or its ids, or ids that stand for embeddings and these."""
        row = self._rows[i]
        if self._kind == "prompt":
            return checks.checked_text(row, i, self.is_list), None, None
        place = self._place(self._kind, i)
        if self._kind == "input_ids":
            return None, checks.token_ids(row, place, self._limits.vocab_size), None
        embeds = checks.embeds(row, place, self._limits.hidden_size)
        start = self._each["logprob_start_len"][i]
        if self._friends[i] or (isinstance(start, int | np.integer) and start >= 0):
            raise RequestError(
                "`input_embeds` have no token ids, so they go neither with `companions` nor with "
                "`logprob_start_len`; pass `input_ids`, or leave these out."
            )
        return None, np.full(len(embeds), -1, np.int32), embeds

    def _companions(self, i: int) -> tuple[str | np.ndarray, ...]:
        place, vocab_size = self._place("companions", i), self._limits.vocab_size
        return tuple(
            checks.companion(friend, place, vocab_size, self._parser.tokenizer)
            for friend in self._friends[i]
        )


def group_size(arguments: Mapping[str, Any]) -> int:
    """Prompts that are continued in lockstep: one, and its companions."""
    names = ("prompt", "input_ids", "companions")
    prompt, input_ids, companions = (arguments.get(name) for name in names)
    if not companions or (prompt is None and input_ids is None):
        return 1
    is_list = not isinstance(prompt, str)
    if prompt is None:
        is_list = checks.is_list_of_prompts(input_ids)
    first = companions[0] if is_list and isinstance(companions, list | tuple) else companions
    return 1 + len(first) if isinstance(first, list | tuple) else 1


def _check_others(others: Mapping[str, Any], specs: Mapping[str, Param]) -> None:
    if not others:
        return
    params = {*specs, *(field.name for field in dataclasses.fields(SamplingParams))}
    for name, value in others.items():
        known = GENERATE_ARGUMENTS.get(name)
        if known is None or known.fate == "honoured":
            if name in params or name in SAMPLING_PARAMETERS:
                hint = "; it is a sampling parameter: put it into `sampling_params`."
            else:
                hint = nearest(name, (*DEFAULTS, *params, *GENERATE_ARGUMENTS))
            raise TypeError(f"generate() got an unexpected keyword argument `{name}`{hint}")
        if known.fate == "ignored":
            _warn_once(name, known.why)
        elif known.is_asked_for(value):
            raise RequestError(f"`{name}` is not supported: {known.why}. Leave it out.")


@functools.cache
def _warn_once(name: str, why: str) -> None:
    logger.warning("`%s` is ignored: %s.", name, why)


def _is_row(value: Any) -> bool:
    """Whether an argument has a value for every prompt."""
    return isinstance(value, list | tuple | np.ndarray)


def _rows(given: Mapping[str, Any], tokenizer: Any) -> tuple[str, list[Any], bool]:
    """Which argument the prompts are given in, one entry a prompt, and whether it is a list."""
    kinds = ("prompt", "input_ids", "input_embeds")
    names = [name for name in kinds if given[name] is not None]
    if not names:
        raise RequestError("`prompt`, `input_ids` or `input_embeds` must be given.")
    if len(names) > 1:
        listed = " and ".join(f"`{name}`" for name in names)
        raise RequestError(
            f"{listed} are {'both ' * (len(names) == 2)}given; leave all but one out."
        )
    [kind] = names
    prompts = given[kind]
    if kind == "prompt":
        is_list = not isinstance(prompts, str)
        return kind, checks.texts(prompts, is_list, tokenizer), is_list
    of_many = checks.is_list_of_prompts if kind == "input_ids" else checks.is_list_of_embeds
    is_list = of_many(prompts)
    return kind, list(prompts) if is_list else [prompts], is_list


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
