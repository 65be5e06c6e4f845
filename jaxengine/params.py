"""Sampling parameters: what a request may ask for, checked and made ready for the sampler.

Owns the parameters the host acts on (lengths, stops, seeds). Ranges of the others live with the
sampler, which publishes them as `Param`s. Knows nothing of jax.
"""

import dataclasses
import functools
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxengine.compat import SAMPLING_PARAMETERS, nearest
from jaxengine.errors import RequestError
from jaxengine.param_readers import host_readers, param_value, read, show
from jaxengine.types import Param

SAMPLER_FIELDS = frozenset(
    """
    frequency_penalty logit_bias min_p presence_penalty repetition_penalty temperature top_k top_p
    """.split()
)
"""Fields of `SamplingParams` that exist when the engine's sampler publishes them."""

type Number = int | float


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


class HostParams(NamedTuple):
    """The checked parameters that the host acts on; `SamplingParams` explains them.

    Tuples have no repeats, and `sampling_seed` has become `seed`.
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int | None = None
    seed: int | None = None
    seed_mode: str = "derived"


class ParsedParams(NamedTuple):
    """Checked parameters of one prompt.

    Attributes:
      params: Those that the host acts on.
      values: A number, or an array padded to its `Param`'s shape, for every `Param` of the sampler
        that is given; the others have their defaults.
    """

    params: HostParams
    values: Mapping[str, Any]


class ParamsParser:
    """Checks sampling parameters of prompts that have one sampler.

    Attributes:
      specs: Parameters of the sampler.
      vocab_size: Token ids are in [0, vocab_size).
      tokenizer: None when the engine has none.
    """

    def __init__(self, specs: Mapping[str, Param], *, vocab_size: int, tokenizer: Any) -> None:
        """Args:
        specs: `logit_bias_ids` and `logit_bias_values` are filled from `logit_bias`.
        vocab_size: Of the model.
        tokenizer: For `Param.encode`.
        """
        self.specs = specs
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self._known = _known_names(specs)
        self._readers = host_readers(specs, vocab_size)

    def parse(self, raw: Any, index: int | None) -> ParsedParams:
        """Checks those of one prompt.

        A dict states only the keys it holds (None is the default, except that `max_new_tokens`
        None lifts the limit); a `SamplingParams` states every field the sampler knows.

        Args:
          raw: A dict, a `SamplingParams`, or None for all defaults; of any type, as users are.
          index: Place of the prompt in its list, for messages; None when there is no list.

        Raises:
          TypeError: For a name nobody knows, with the nearest one.
          RequestError: For a value of the wrong type or range, or a feature that does not exist
            yet.
        """
        place = "" if index is None else f" of prompt {index}"
        given = _as_dict(raw, self._known, place)
        _check_names(given, self._known, place)
        given = {k: v for k, v in given.items() if v is not None or k == "max_new_tokens"}
        host = {
            name: read(name, given.pop(name), reader, place)
            for name, reader in self._readers.items()
            if name in given
        }
        _check_together(host, place, has_tokenizer=self.tokenizer is not None)
        if biases := host.pop("logit_bias", None):
            given["logit_bias_ids"] = [*biases]
            given["logit_bias_values"] = [*biases.values()]
        values = {
            name: read(name, given[name], functools.partial(self._value, param), place)
            for name, param in self.specs.items()
            if name in given
        }
        if "sampling_seed" in host:
            host["seed"] = host.pop("sampling_seed")
        return ParsedParams(HostParams(**host), values)

    def _value(self, param: Param, value: Any) -> Any:
        return param_value(param, value, self.tokenizer)


def derive_seed(seed: int, prompt_key: int | str, sample_index: int) -> int:
    """Effective seed of one sample, in [0, 2**63): `seed` itself for prompt 0, sample 0."""
    if prompt_key == 0 and sample_index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{prompt_key!r}/{sample_index}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def fresh_seed() -> int:
    """A seed nobody has used, in [0, 2**63)."""
    return secrets.randbits(63)


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
        what = f"must be a dict or SamplingParams, got {show(raw)}."
        raise RequestError(f"`sampling_params`{place} {what}")
    # The second is SGLang's name.
    for source in ("custom", "custom_params"):
        custom = given.pop(source, None)
        if not custom:
            continue
        if not isinstance(custom, Mapping):
            raise RequestError(f"`{source}`{place} must be a dict, got {show(custom)}.")
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


_TOKENIZER_USES = {
    "stop": "to see text",
    "stop_regex": "to see text",
    "min_new_tokens": "for its EOS token id",
}
"""What parameters of the host need a tokenizer for."""


def _check_together(host: Mapping[str, Any], place: str, *, has_tokenizer: bool) -> None:
    limit = host.get("max_new_tokens", _DEFAULTS["max_new_tokens"])
    fewest = host.get("min_new_tokens", 0)
    if limit is not None and fewest > limit:
        raise RequestError(
            f"`min_new_tokens`{place} must be in [0, max_new_tokens ({limit})], got {fewest}."
        )
    if not has_tokenizer:
        for name, what in _TOKENIZER_USES.items():
            if host.get(name):
                raise RequestError(
                    f"`{name}`{place} is unavailable when skip_tokenizer_init=True: it needs the "
                    f"tokenizer {what}, got {show(host[name])}."
                )
    if "sampling_seed" in host and host.get("seed", host["sampling_seed"]) != host["sampling_seed"]:
        raise RequestError(f"`seed` and `sampling_seed`{place} are one parameter and differ.")
