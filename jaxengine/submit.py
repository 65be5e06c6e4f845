"""From a checked call to sequences under way: tokenized, limited, seeded, named and queued."""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxengine.call import Call
from jaxengine.channel import Channel
from jaxengine.config import EngineConfig
from jaxengine.errors import PromptTooLongError, QueueFullError, RequestError
from jaxengine.hidden import HiddenCollector
from jaxengine.log import logger
from jaxengine.outputs import SequenceOutput
from jaxengine.params import SamplingParams, derive_seed, fresh_seed
from jaxengine.requests import ParsedCall, PromptRequest, Refused
from jaxengine.runtime.samplers import LiveSampler
from jaxengine.text.detokenizer import Detokenizer, Vocabulary
from jaxengine.text.tokenizer import encode
from jaxengine.types import MAX_STOP_TOKEN_IDS, SequenceRequest, SequenceUpdate, StopReason
from jaxengine.worker import Output, Worker


class Submitter:
    """Hands calls to the worker, and owns the ids of what is in flight.

    A call under way holds it, so what stops the worker is tied to its life, not to the Engine's.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        tokenizer: Any,
        vocabulary: Vocabulary | None,
        eos_token_ids: tuple[int, ...],
        config: EngineConfig,
        weight_versions: Sequence[str],
    ) -> None:
        """Starts with nothing in flight.

        Args:
          worker: Takes what is submitted.
          tokenizer: None where ids come in and go out.
          vocabulary: Its tokens' bytes.
          eos_token_ids: End every text that does not ignore them.
          config: With every None resolved.
          weight_versions: Names of all weights there have been; grows.
        """
        self._worker = worker
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos = eos_token_ids
        self._config = config
        self._weight_versions = weight_versions
        seed = config.random_seed
        self._seeds = None if seed is None else np.random.default_rng(seed)
        self._seq_ids = itertools.count()
        self._rids: dict[str, dict[int, SequenceRequest]] = {}
        self._num_in_flight = 0
        # Reentrant: the garbage collector may drop a Call, which releases ids, inside it.
        self._rids_lock = threading.RLock()

    def sequences(
        self, parsed: ParsedCall, live: LiveSampler, *, is_streaming: bool
    ) -> list[SequenceRequest | Refused]:
        """The samples of a call, prompt-major; nothing is queued yet.

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
                    self._sequence(request, ids, sample, live, is_streaming=is_streaming)
                    for sample in range(parsed.n)
                ]
            except Exception as error:
                if not parsed.returns_errors:
                    raise
                samples += [Refused(request.rid, error)] * parsed.n
        return samples

    def submit(
        self,
        parsed: ParsedCall,
        samples: list[SequenceRequest | Refused],
        *,
        is_streaming: bool,
        has_text: bool,
    ) -> Call:
        """Queues the samples, all at once.

        Args:
          parsed: The call.
          samples: Its `sequences`.
          is_streaming: Outputs are given as they grow.
          has_text: Lists of logprobs carry the tokens' text.

        Raises:
          RequestError: For an id that is in flight.
          QueueFullError: If more would wait than may.
          EngineDeadError: After the worker was stopped.
        """
        decode = None
        if has_text and self._tokenizer is not None:
            decode = functools.partial(_decode, self._tokenizer)
        channel = Channel()
        queued: dict[int, SequenceRequest] = {}
        outputs: list[tuple[SequenceRequest, Output]] = []
        for index, sample in enumerate(samples):
            request = parsed.requests[index // parsed.n]
            make = functools.partial(
                self._output,
                channel,
                index,
                decode,
                request if isinstance(request, PromptRequest) else None,
                parsed.returns_errors,
            )
            if isinstance(sample, Refused):
                nothing = self._nothing(sample.rid, is_streaming)
                make(nothing).push(SequenceUpdate(nothing.seq_id, [], error=sample.error))
            else:
                queued[index] = sample
                outputs.append((sample, make(sample)))
        self._claim(queued.values())
        # Made before anything is queued: from here on whatever goes wrong, Ctrl-C too, aborts it.
        call = Call(
            channel,
            queued,
            num_outputs=len(samples),
            is_single=parsed.is_single,
            abort=self._abort,
            release=self._release,
        )
        try:
            self._worker.submit(outputs)
        except BaseException:
            call.close()
            raise
        return call

    def abort(self, is_meant: Callable[[str], bool]) -> None:
        """Ends the requests in flight whose id is meant."""
        with self._rids_lock:
            # Copies: what the garbage collector drops meanwhile releases its ids.
            requests = [
                request
                for rid, named in list(self._rids.items())
                if is_meant(rid)
                for request in list(named.values())
            ]
        self._abort(requests)

    def _output(
        self,
        channel: Channel,
        index: int,
        decode: Callable[[int], str] | None,
        request: PromptRequest | None,
        returns_errors: bool,
        sample: SequenceRequest,
    ) -> SequenceOutput:
        params = SamplingParams() if request is None else request.params
        return SequenceOutput(
            sample,
            channel,
            index=index,
            detokenizer=self._detokenizer(params),
            has_stop_strings=bool(params.stop or params.stop_regex),
            decode=decode,
            weight_versions=self._weight_versions,
            returns_errors=returns_errors,
            hidden=None if request is None else _collector(request, sample),
            stream_interval=params.stream_interval or self._config.stream_interval,
            is_incremental=self._config.incremental_streaming_output,
            has_prompt_ids=request is not None and request.has_prompt_ids,
        )

    def _nothing(self, rid: str, is_streaming: bool) -> SequenceRequest:
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
        config = self._config
        assert config.context_length is not None and config.max_total_tokens is not None
        most = min(config.context_length, config.max_total_tokens) - 1
        if not config.allow_auto_truncate or len(ids) <= most or request.embeds is not None:
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
        stop_ids = tuple(dict.fromkeys((*(params.stop_token_ids or ()), *self._eos)))
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
        longest = max(len(text) for text in (ids, *companions))
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
            dataclasses.replace(
                alone,
                seq_id=next(self._seq_ids),
                prompt_ids=text,
                logprob_start=None,
                hidden_states=None,
            )
            for text in companions
        )
        return dataclasses.replace(alone, companions=grouped) if grouped else alone

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
        context, pool = self._config.context_length, self._config.max_total_tokens
        assert context is not None and pool is not None
        asked = request.params.max_new_tokens
        where = f"Prompt {request.index} has {prompt_len:,} tokens"
        if prompt_len >= context:
            raise PromptTooLongError(
                f"{where}; `context_length` is {context:,} and must hold at least one more. "
                "Shorten it, or raise `context_length` if the model allows."
            )
        if prompt_len >= pool:
            raise PromptTooLongError(
                f"{where}; the KV pages hold {pool:,} in all. "
                "Shorten it, or raise `max_total_tokens` or `mem_fraction_static`."
            )
        room = min(context, pool) - prompt_len
        return room if asked is None else min(asked, room)

    def _detokenizer(self, params: SamplingParams) -> Detokenizer | None:
        if self._vocabulary is None:
            return None
        return Detokenizer(
            self._vocabulary,
            stop=tuple(params.stop or ()),
            stop_regex=tuple(params.stop_regex or ()),
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            no_stop_trim=params.no_stop_trim,
        )

    def _claim(self, samples: Collection[SequenceRequest]) -> None:
        """Takes the ids and the room of samples, or of none of them."""
        config = self._config
        with self._rids_lock:
            for sample in samples:
                if sample.rid in self._rids:
                    raise RequestError(
                        f"`rid` {sample.rid!r} is already in flight; choose another."
                    )
            if config.max_queued_requests is not None:
                assert config.max_running_requests is not None
                limit = config.max_running_requests + config.max_queued_requests
                if self._num_in_flight + len(samples) > limit:
                    raise QueueFullError(
                        f"{len(samples):,} more samples do not fit: {self._num_in_flight:,} are in "
                        f"flight, and `max_queued_requests` lets {limit:,} be, those that run "
                        "included. Wait for some to end, send fewer at once, or raise it."
                    )
            for sample in samples:
                self._rids.setdefault(sample.rid, {})[sample.seq_id] = sample
            self._num_in_flight += len(samples)

    def _release(self, samples: list[SequenceRequest]) -> None:
        with self._rids_lock:
            for sample in samples:
                named = self._rids[sample.rid]
                del named[sample.seq_id]
                if not named:
                    del self._rids[sample.rid]
            self._num_in_flight -= len(samples)

    def _abort(self, requests: list[SequenceRequest]) -> None:
        for request in requests:
            self._worker.finish(SequenceUpdate(request.seq_id, [], finish=StopReason("abort")))


def _collector(request: PromptRequest, sample: SequenceRequest) -> HiddenCollector | None:
    if request.hidden_states is None:
        return None
    return HiddenCollector(
        request.hidden_states,
        request.hidden_format,
        len(sample.prompt_ids),
        sample.max_new_tokens,
        may_be_cut=bool(request.params.stop or request.params.stop_regex),
    )


def _decode(tokenizer: Any, token_id: int) -> str:
    return tokenizer.decode([token_id])
