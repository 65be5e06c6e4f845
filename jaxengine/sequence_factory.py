"""From checked prompts to sequences: tokenized, limited, seeded and numbered."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxengine.config import EngineConfig
from jaxengine.errors import PromptTooLongError, RequestError
from jaxengine.log import logger
from jaxengine.params import derive_seed, fresh_seed
from jaxengine.requests import ParsedCall, PromptRequest, Refused
from jaxengine.runtime.samplers import LiveSampler
from jaxengine.text.tokenizer import encode
from jaxengine.types import MAX_STOP_TOKEN_IDS, SequenceRequest


class SequenceFactory:
    """Makes the sequences of a call."""

    def __init__(
        self, config: EngineConfig, *, tokenizer: Any, eos_token_ids: tuple[int, ...]
    ) -> None:
        """Starts numbering.

        Args:
          config: With every None resolved.
          tokenizer: None where ids come in.
          eos_token_ids: End every text that does not ignore them.
        """
        assert config.context_length is not None and config.max_total_tokens is not None
        self._config = config
        self._context, self._pool = config.context_length, config.max_total_tokens
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        seed = config.random_seed
        self._seeds = None if seed is None else np.random.default_rng(seed)
        self._seq_ids = itertools.count()

    def sequences(self, parsed: ParsedCall, live: LiveSampler) -> list[SequenceRequest | Refused]:
        """The samples of a call, prompt-major.

        Raises:
          RequestError: For a prompt that does not fit, or has no tokens; where the call wants
            errors among its outputs, it is refused alone.
        """
        tokenized = self._tokenize(parsed)
        samples: list[SequenceRequest | Refused] = []
        for request in parsed.requests:
            try:
                if isinstance(request, Refused):
                    raise request.error
                ids = self._fitted(tokenized(request), request)
                samples += [
                    self._sequence(request, ids, sample, live, is_streaming=parsed.is_streaming)
                    for sample in range(parsed.n)
                ]
            except Exception as error:
                if not parsed.returns_errors:
                    raise
                samples += [Refused(request.rid, error)] * parsed.n
        return samples

    def nothing(self, rid: str, *, is_streaming: bool) -> SequenceRequest:
        """Stands for a request that is refused."""
        return SequenceRequest(
            seq_id=next(self._seq_ids),
            rid=rid,
            prompt_ids=np.empty(0, np.int32),
            max_new_tokens=0,
            is_streaming=is_streaming,
        )

    def _tokenize(self, parsed: ParsedCall) -> Callable[[PromptRequest], np.ndarray]:
        """Gives each prompt's ids. Texts are tokenized at once, or each when it is asked for where
        one that fails is to fail alone."""
        prompts = [r for r in parsed.requests if isinstance(r, PromptRequest)]
        texts = [r.text for r in prompts if r.text is not None]
        rows: dict[str, list[int]] = {}
        try:
            rows = dict(zip(texts, encode(self._tokenizer, texts), strict=True)) if texts else {}
        except Exception:
            if not parsed.returns_errors:
                raise

        def ids_of(request: PromptRequest) -> np.ndarray:
            if request.input_ids is not None:
                return request.input_ids
            text = request.text
            assert text is not None
            row = rows[text] if text in rows else encode(self._tokenizer, [text])[0]
            if not row:
                raise RequestError(f"Prompt {request.index} has no tokens: {text!r}.")
            return np.asarray(row, np.int32)

        return ids_of

    def _fitted(self, ids: np.ndarray, request: PromptRequest) -> np.ndarray:
        """The prompt, without its end where that is allowed and leaves room for one token."""
        most = min(self._context, self._pool) - 1
        is_cut = self._config.allow_auto_truncate and request.embeds is None
        if not is_cut or len(ids) <= most:
            return ids
        logger.warning("Prompt %d of %d tokens is cut to %d.", request.index, len(ids), most)
        return ids[:most]

    def _sequence(
        self,
        request: PromptRequest,
        ids: np.ndarray,
        sample: int,
        live: LiveSampler,
        *,
        is_streaming: bool,
    ) -> SequenceRequest:
        params = request.params
        stop_ids = tuple(dict.fromkeys((*params.stop_token_ids, *self._eos)))
        if len(stop_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"`stop_token_ids` of prompt {request.index} and the model's own are "
                f"{len(stop_ids)} ids; at most {MAX_STOP_TOKEN_IDS} are possible."
            )
        if request.logprob_start is not None and request.logprob_start > len(ids):
            raise RequestError(
                f"`logprob_start_len` of prompt {request.index} must be at most its length, "
                f"{len(ids)} tokens, got {request.logprob_start}."
            )
        companions = [
            np.asarray(encode(self._tokenizer, [c])[0], np.int32) if isinstance(c, str) else c
            for c in request.companions
        ]
        longest = max(map(len, (ids, *companions)))
        is_exact = params.seed_mode == "exact"
        seed = self._seed(params.seed)
        alone = SequenceRequest(
            seq_id=next(self._seq_ids),
            rid=request.rid,
            prompt_ids=ids,
            max_new_tokens=self._max_new_tokens(request, longest),
            min_new_tokens=params.min_new_tokens,
            stop_token_ids=stop_ids,
            ignore_eos=params.ignore_eos,
            seed=seed if is_exact else derive_seed(seed, request.seed_key, sample),
            values=request.values,
            sampler_id=live.sampler_id,
            sampler=live,
            is_stateful=live.is_stateful,
            is_streaming=is_streaming,
            wants_logprobs=request.return_logprob,
            num_top_logprobs=request.num_top_logprobs,
            logprob_ids=request.logprob_ids,
            logprob_start=request.logprob_start,
            hidden_states=request.hidden_states,
            embeds=request.embeds,
            cache_namespace=request.cache_namespace,
            priority=self._priority(request),
            timeout_s=request.timeout_s,
        )
        grouped = tuple(
            alone._replace(
                seq_id=next(self._seq_ids),
                prompt_ids=text,
                logprob_start=None,
                hidden_states=None,
            )
            for text in companions
        )
        return alone._replace(companions=grouped) if grouped else alone

    def _priority(self, request: PromptRequest) -> int:
        config = self._config
        if request.priority is None:
            return config.default_priority_value or 0
        if config.abort_on_priority_when_disabled and not config.has_priorities:
            raise RequestError(
                f"`priority` of prompt {request.index} is {request.priority}, but this engine has "
                "no priorities; leave it out, or make the engine with "
                "enable_priority_scheduling=True."
            )
        return request.priority

    def _seed(self, seed: int | None) -> int:
        if seed is not None:
            return seed
        return fresh_seed() if self._seeds is None else int(self._seeds.integers(2**63))

    def _max_new_tokens(self, request: PromptRequest, prompt_len: int) -> int:
        """The limit after clipping to the context and to the pool, as SGLang clips it."""
        room = min(self._context, self._pool) - prompt_len
        if room <= 0:
            raise self._too_long(request.index, prompt_len)
        asked = request.params.max_new_tokens
        return room if asked is None else min(asked, room)

    def _too_long(self, index: int, prompt_len: int) -> PromptTooLongError:
        where = f"Prompt {index} has {prompt_len:,} tokens"
        if prompt_len >= self._context:
            return PromptTooLongError(
                f"{where}; `context_length` is {self._context:,} and must hold at least one more. "
                "Shorten it, or raise `context_length` if the model allows."
            )
        return PromptTooLongError(
            f"{where}; the KV pages hold {self._pool:,} in all. "
            "Shorten it, or raise `max_total_tokens` or `mem_fraction_static`."
        )
