"""Sampling parameters: what a request may ask for, checked and made ready for the sampler.

Owns the parameters the host acts on (lengths, stops, seeds). Ranges of the others live with the
sampler, which publishes them as `Param`s. Knows nothing of jax.
"""

import dataclasses
import hashlib
import reprlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from jaxengine.compat import SAMPLING_PARAMETERS, nearest
from jaxengine.errors import RequestError
from jaxengine.types import MAX_STOP_TOKEN_IDS, Param

SAMPLER_FIELDS = frozenset(
    """
    frequency_penalty logit_bias min_p presence_penalty repetition_penalty temperature top_k top_p
    """.split()
)
"""Fields of `SamplingParams` that exist when the engine's sampler publishes them."""

type Number = int | float

_MAX_INT32 = 2**31 - 1
_MAX_FLOAT32 = 3.4028234663852886e38


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued; a plain dict with the same keys does as well.

    Attributes:
      max_new_tokens: Most tokens to generate; None is up to the context length.
      min_new_tokens: Fewest tokens before a stop token may end the text.
      temperature: 0 is greedy.
      top_p: Nucleus, in (0, 1].
      top_k: Number of candidates; -1 is all.
      min_p: Share of the best candidate's probability, in [0, 1].
      frequency_penalty: Subtracted per occurrence of a generated token.
      presence_penalty: Subtracted once from generated tokens.
      repetition_penalty: Divides (or multiplies, below 0) logits of generated tokens; 1 is off.
      logit_bias: Token id (or its decimal string) to what is added to its logit.
      n: Samples of the prompt.
      stop: Strings that end the text.
      stop_regex: Patterns (of the `regex` package) that end the text at their first match; it is
        trimmed, and `matched` is the pattern.
      stop_token_ids: Token ids that end the text, beside the model's own.
      ignore_eos: No token ends the text, `stop_token_ids` included; stop strings still do.
      skip_special_tokens: Leave special tokens out of the text.
      spaces_between_special_tokens: Passed to tokenizers that know it.
      no_stop_trim: Keep what ended the text in it.
      stream_interval: Tokens between two outputs of a stream, at least; the engine's when None.
      seed: In [0, 2**63); fresh when None.
      sampling_seed: SGLang's name of `seed`.
      seed_mode: "derived" gives every prompt and sample of a call a stream of its own; "exact"
        uses the seed as it is for all of them, so that they share their noise.
      custom: Parameters of the sampler or logit processor, by name; SGLang's `custom_params` in a
        dict is the same.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: Number = 1.0
    top_p: Number = 1.0
    top_k: int = -1
    min_p: Number = 0.0
    frequency_penalty: Number = 0.0
    presence_penalty: Number = 0.0
    repetition_penalty: Number = 1.0
    logit_bias: Mapping[Any, Number] | None = None
    n: int = 1
    stop: str | Sequence[str] | None = ()
    stop_regex: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int | None = None
    seed: int | None = None
    sampling_seed: int | None = None
    seed_mode: str = "derived"
    custom: Mapping[str, Any] = field(default_factory=dict)


_DEFAULTS = {f.name: getattr(SamplingParams(), f.name) for f in dataclasses.fields(SamplingParams)}


class ParsedParams(NamedTuple):
    """Checked parameters of one prompt.

    Attributes:
      params: `stop` and `stop_token_ids` are tuples without repeats, `logit_bias` has int keys,
        `sampling_seed` has become `seed`.
      values: A number, or an array padded to its `Param`'s shape, for every `Param` of the sampler.
    """

    params: SamplingParams
    values: Mapping[str, Any]


def parse_sampling_params(
    raw: Any, specs: Mapping[str, Param], *, index: int | None, vocab_size: int, tokenizer: Any
) -> ParsedParams:
    """Checks one prompt's sampling parameters.

    A dict states only the keys it holds (None is the default, except that `max_new_tokens` None
    lifts the limit); a `SamplingParams` states every field the sampler knows.

    Args:
      raw: A dict, a `SamplingParams`, or None for all defaults; of any type, as users are.
      specs: Parameters of the engine's sampler. `logit_bias_ids` and `logit_bias_values` are
        filled from `logit_bias`.
      index: Place of the prompt in its list, for messages; None when there is no list.
      vocab_size: Token ids are in [0, vocab_size).
      tokenizer: For `Param.encode`; None when the engine has none.

    Raises:
      TypeError: For a name nobody knows, with the nearest one.
      RequestError: For a value of the wrong type or range, or a feature that does not exist yet.
    """
    place = "" if index is None else f" of prompt {index}"
    known = _known_names(specs)
    given = _as_dict(raw, known, place)
    _check_names(given, known, place)
    given = {k: v for k, v in given.items() if v is not None or k == "max_new_tokens"}
    host = {
        name: _read(name, given.pop(name), reader, place)
        for name, reader in _host_readers(specs, vocab_size).items()
        if name in given
    }
    _check_together(host, place, has_tokenizer=tokenizer is not None)
    asked = given | {
        "logit_bias_ids": [*host.get("logit_bias", {})],
        "logit_bias_values": [*host.get("logit_bias", {}).values()],
    }
    values = {
        name: _read(name, asked.get(name), lambda x, p=param: _value(p, x, tokenizer), place)
        for name, param in specs.items()
    }
    if "sampling_seed" in host:
        host["seed"] = host.pop("sampling_seed")
    fields = {name: values[name] for name in SAMPLER_FIELDS & specs.keys()}
    custom = {name: value for name, value in given.items() if name not in _DEFAULTS}
    return ParsedParams(SamplingParams(**host, **fields, custom=custom), values)


def derive_seed(seed: int, prompt_key: int | str, sample_index: int) -> int:
    """Effective seed of one sample, in [0, 2**63): `seed` itself for prompt 0, sample 0."""
    if prompt_key == 0 and sample_index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{prompt_key!r}/{sample_index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def fresh_seed() -> int:
    """A seed nobody has used, in [0, 2**63)."""
    return secrets.randbits(63)


class _Bad(ValueError):
    """What is wrong with a value, as a clause: "must be an integer"."""


def _known_names(specs: Mapping[str, Param]) -> set[str]:
    """Keys a user may set: the host's, and those of the sampler."""
    names = {*_DEFAULTS, *specs} - {"custom", "logit_bias_ids", "logit_bias_values"}
    has_bias = {"logit_bias_ids", "logit_bias_values"} <= specs.keys()
    lacking = SAMPLER_FIELDS - specs.keys() - ({"logit_bias"} if has_bias else set())
    return names - lacking


def _as_dict(raw: Any, known: set[str], place: str) -> dict[str, Any]:
    if isinstance(raw, SamplingParams):
        # A field this sampler lacks counts as asked for only where it was changed.
        given = {
            name: getattr(raw, name)
            for name, default in _DEFAULTS.items()
            if name in known or getattr(raw, name) != default
        }
        given["custom"] = raw.custom
    elif raw is None or isinstance(raw, Mapping):
        given = dict(raw or {})
    else:
        what = f"must be a dict or SamplingParams, got {_show(raw)}."
        raise RequestError(f"`sampling_params`{place} {what}")
    # The second is SGLang's name.
    for source in ("custom", "custom_params"):
        custom = given.pop(source, None) or {}
        if not isinstance(custom, Mapping):
            raise RequestError(f"`{source}`{place} must be a dict, got {_show(custom)}.")
        for name in custom:
            if name in given:
                raise RequestError(f"`{name}`{place} is given twice: in `{source}` and beside it.")
        given |= custom
    return given


def _check_names(given: Mapping[str, Any], known: set[str], place: str) -> None:
    for name in given.keys() - known:
        if name in SAMPLER_FIELDS:
            raise TypeError(f"`{name}`{place} is not a parameter of this engine's sampler.")
        refused = SAMPLING_PARAMETERS.get(name)
        if refused is None or refused.fate != "refused":
            near = nearest(str(name), known | SAMPLING_PARAMETERS.keys())
            raise TypeError(f"Unknown sampling parameter `{name}`{place}{near}")
        if refused.is_asked_for(given[name]):
            why = f"is not supported: {refused.why}. Leave it out."
            raise RequestError(f"`{name}`{place} {why}")


def _check_together(host: Mapping[str, Any], place: str, *, has_tokenizer: bool) -> None:
    limit = host.get("max_new_tokens", _DEFAULTS["max_new_tokens"])
    fewest = host.get("min_new_tokens", 0)
    if limit is not None and fewest > limit:
        raise RequestError(
            f"`min_new_tokens`{place} must be in [0, max_new_tokens ({limit})], got {fewest}."
        )
    if not has_tokenizer:
        uses = {name: "to see text" for name in ("stop", "stop_regex")}
        for name, what in {**uses, "min_new_tokens": "for its EOS token id"}.items():
            if host.get(name):
                raise RequestError(
                    f"`{name}`{place} is unavailable when skip_tokenizer_init=True: it needs the "
                    f"tokenizer {what}, got {_show(host[name])}."
                )
    seeds = {host[name] for name in ("seed", "sampling_seed") if name in host}
    if len(seeds) > 1:
        raise RequestError(f"`seed` and `sampling_seed`{place} are one parameter and differ.")


def _read(name: str, value: Any, reader: Callable[[Any], Any], place: str) -> Any:
    try:
        return reader(value)
    except _Bad as bad:
        raise RequestError(f"`{name}`{place} {bad}, got {_show(value)}.") from None


def _show(value: Any) -> str:
    shown = reprlib.repr(value)
    return shown if isinstance(value, Real) else f"{shown} ({type(value).__name__})"


def _host_readers(specs: Mapping[str, Param], vocab_size: int) -> dict[str, Callable[[Any], Any]]:
    max_biases = specs["logit_bias_ids"].shape[0] if "logit_bias_ids" in specs else 0
    seed = _integer_in(0, 2**63 - 1, "must be an integer in [0, 2**63)")
    return {
        "max_new_tokens": lambda value: None if value is None else _count(value),
        "min_new_tokens": _count,
        "logit_bias": lambda value: _logit_bias(value, vocab_size, max_biases),
        "n": _integer_in(1, None, "must be an integer of at least 1"),
        "stop": _stop_strings,
        "stop_regex": _stop_strings,
        "stop_token_ids": lambda value: _stop_token_ids(value, vocab_size),
        "ignore_eos": _boolean,
        "skip_special_tokens": _boolean,
        "spaces_between_special_tokens": _boolean,
        "no_stop_trim": _boolean,
        "stream_interval": _integer_in(1, None, "must be an integer of at least 1"),
        "seed": seed,
        "sampling_seed": seed,
        "seed_mode": _seed_mode,
    }


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _integer_in(low: int, high: int | None, clause: str) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not _is_number(value, Integral) or value < low or (high is not None and value > high):
            raise _Bad(clause)
        return int(value)

    return read


_count = _integer_in(0, None, "must be an integer of at least 0")


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _Bad("must be True or False")
    return bool(value)


def _seed_mode(value: Any) -> str:
    if value not in ("derived", "exact"):
        raise _Bad('must be "derived" or "exact"')
    return value


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(s, str) and s for s in stops):
        raise _Bad("must be a string or a list of strings, none of them empty")
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    clause = f"must be a list of token ids in [0, {vocab_size})"
    if not isinstance(value, list | tuple | set | frozenset | np.ndarray):
        raise _Bad(clause)
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise _Bad(f"must have at most {MAX_STOP_TOKEN_IDS} entries, has {len(value)}")
    read = _integer_in(0, vocab_size - 1, clause)
    return tuple(dict.fromkeys(read(token_id) for token_id in value if token_id is not None))


def _logit_bias(value: Any, vocab_size: int, max_biases: int) -> dict[int, float]:
    clause = f"must map token ids in [0, {vocab_size}) to finite numbers"
    if not isinstance(value, Mapping):
        raise _Bad(clause)
    if len(value) > max_biases:
        raise _Bad(f"must have at most {max_biases} entries, has {len(value)}")
    biases = {}
    for key, bias in value.items():
        token_id: Any = int(key) if isinstance(key, str) and key.isdecimal() else key
        if not _is_number(token_id, Integral) or not 0 <= token_id < vocab_size:
            raise _Bad(f"{clause}; key {key!r} is none")
        if not _is_number(bias, Real) or not abs(_plain(bias)) <= _MAX_FLOAT32:
            raise _Bad(f"{clause}; {bias!r} is none")
        biases[int(token_id)] = float(bias)
    return biases


def _value(param: Param, value: Any, tokenizer: Any) -> Any:
    is_scalar = param.shape == () and param.encode is None
    if value is None:
        return param.default if is_scalar else _padded(param, param.default)
    if is_scalar:
        value = _scalar(param, value)
    if clause := _clause(param, value):
        raise _Bad(clause)
    if param.encode is not None:
        try:
            value = param.encode(value, tokenizer)
        except (TypeError, ValueError) as error:
            raise _Bad(f"is not usable ({error})") from error
    return value if is_scalar else _padded(param, value)


def _scalar(param: Param, value: Any) -> Number:
    is_float = param.dtype == "float32"
    if not _is_number(value, Real if is_float else Integral):
        clause = None
        with suppress(Exception):  # a check may be written for numbers only
            clause = param.check(value)
        raise _Bad(clause or ("must be a number" if is_float else "must be an integer"))
    value = _plain(value)
    if (_MAX_FLOAT32 if is_float else _MAX_INT32) < abs(value) < float("inf"):
        raise _Bad(f"must fit into {param.dtype}")
    return float(value) if is_float else int(value)


def _clause(param: Param, value: Any) -> str | None:
    try:
        return param.check(value)
    except (TypeError, ValueError) as error:
        return f"is not usable ({error})"


def _padded(param: Param, value: Any) -> np.ndarray:
    array = np.full(param.shape, param.pad, param.dtype)
    if value is not None:
        part = np.asarray(value)
        if part.ndim != array.ndim or any(map(int.__gt__, part.shape, array.shape)):
            raise _Bad(f"must have a shape of at most {param.shape}, has {part.shape}")
        array[tuple(map(slice, part.shape))] = part
    return array
