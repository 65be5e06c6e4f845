"""From a checked call to sequences under way: tokenized, limited, seeded, named and queued."""

import dataclasses
import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxengine.call import Call
from jaxengine.channel import Channel
from jaxengine.errors import PromptTooLongError, RequestError
from jaxengine.hidden import HiddenCollector
from jaxengine.log import logger
from jaxengine.outputs import SequenceOutput
from jaxengine.params import SamplingParams, derive_seed, fresh_seed
from jaxengine.requests import ParsedCall, PromptRequest
from jaxengine.runtime.samplers import LiveSampler
from jaxengine.text.detokenizer import Detokenizer, Vocabulary
from jaxengine.text.tokenizer import encode
from jaxengine.types import MAX_STOP_TOKEN_IDS, SequenceRequest, SequenceUpdate, StopReason
from jaxengine.worker import Worker


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
        context_length: int,
        max_total_tokens: int,
        random_seed: int | None,
        weight_versions: Sequence[str],
        allow_auto_truncate: bool,
        stream_interval: int = 1,
    ) -> None:
        """Starts with nothing in flight.

        Args:
          worker: Takes what is submitted.
          tokenizer: None where ids come in and go out.
          vocabulary: Its tokens' bytes.
          eos_token_ids: End every text that does not ignore them.
          context_length: Longest prompt plus output, in tokens.
          max_total_tokens: Tokens the KV pages hold.
          random_seed: Seed from which requests without one draw theirs; fresh ones when None.
          weight_versions: Names of all weights there have been; grows.
          allow_auto_truncate: Prompts that are too long lose their end.
          stream_interval: Tokens between two outputs of a stream, where a request does not say.
        """
        self._worker = worker
        self._weight_versions = weight_versions
        self._stream_interval = stream_interval
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos = eos_token_ids
        self._context_length = context_length
        self._max_total_tokens = max_total_tokens
        self._allow_auto_truncate = allow_auto_truncate
        self._seeds = None if random_seed is None else np.random.default_rng(random_seed)
        self._seq_ids = itertools.count()
        self._rids: dict[str, list[SequenceRequest]] = {}
        # Reentrant: the garbage collector may drop a Call, which releases ids, inside it.
        self._rids_lock = threading.RLock()

    def sequences(
        self, parsed: ParsedCall, live: LiveSampler, *, is_streaming: bool
    ) -> list[SequenceRequest]:
        """The samples of a call, prompt-major; nothing is queued yet.

        Raises:
          RequestError: For a prompt that does not fit, or has no tokens.
        """
        prompt_ids = map(self._fitted, self._tokenize(parsed), parsed.requests)
        return [
            self._sequence(request, ids, sample, live, is_streaming=is_streaming)
            for request, ids in zip(parsed.requests, prompt_ids, strict=True)
            for sample in range(parsed.n)
        ]

    def submit(self, parsed: ParsedCall, samples: list[SequenceRequest], *, has_text: bool) -> Call:
        """Queues the samples, all at once.

        Args:
          parsed: The call.
          samples: Its `sequences`.
          has_text: Lists of logprobs carry the tokens' text.

        Raises:
          RequestError: For an id that is in flight.
          EngineDeadError: After the worker was stopped.
        """
        decode = None
        if has_text and self._tokenizer is not None:
            decode = functools.partial(_decode, self._tokenizer)
        channel = Channel()
        by_prompt = itertools.chain.from_iterable(
            itertools.repeat(request, parsed.n) for request in parsed.requests
        )
        outputs = [
            SequenceOutput(
                sample,
                channel,
                index=index,
                detokenizer=self._detokenizer(request.params),
                has_stop_strings=bool(request.params.stop or request.params.stop_regex),
                decode=decode,
                weight_versions=self._weight_versions,
                hidden=_collector(request, sample),
                stream_interval=request.params.stream_interval or self._stream_interval,
                has_prompt_ids=request.has_prompt_ids,
            )
            for index, (request, sample) in enumerate(zip(by_prompt, samples, strict=True))
        ]
        self._claim_rids(samples)
        # Made before anything is queued: from here on whatever goes wrong, Ctrl-C too, aborts it.
        call = Call(
            channel,
            samples,
            is_single=parsed.is_single,
            abort=self._abort,
            release=self._release_rids,
        )
        try:
            self._worker.submit(list(zip(samples, outputs, strict=True)))
        except BaseException:
            call.close()
            raise
        return call

    def abort(self, rid: str) -> None:
        """Ends a request by its id; one that is not in flight is ignored."""
        with self._rids_lock:
            requests = list(self._rids.get(rid, ()))
        self._abort(requests)

    def _tokenize(self, parsed: ParsedCall) -> list[np.ndarray]:
        texts = [r.text for r in parsed.requests if r.text is not None]
        if not texts:
            return [r.input_ids for r in parsed.requests if r.input_ids is not None]
        rows = encode(self._tokenizer, texts)
        for request, row in zip(parsed.requests, rows, strict=True):
            if not row:
                raise RequestError(f"Prompt {request.index} has no tokens: {request.text!r}.")
        return [np.asarray(row, np.int32) for row in rows]

    def _fitted(self, ids: np.ndarray, request: PromptRequest) -> np.ndarray:
        """The prompt, without its end where that is allowed and leaves room for one token."""
        most = min(self._context_length, self._max_total_tokens) - 1
        if not self._allow_auto_truncate or len(ids) <= most or request.embeds is not None:
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

    def _seed(self, seed: int | None) -> int:
        if seed is not None:
            return seed
        return fresh_seed() if self._seeds is None else int(self._seeds.integers(2**63))

    def _max_new_tokens(self, request: PromptRequest, prompt_len: int) -> int:
        """The limit after clipping to the context and to the pool, as SGLang clips it."""
        context, pool = self._context_length, self._max_total_tokens
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

    def _claim_rids(self, samples: list[SequenceRequest]) -> None:
        with self._rids_lock:
            for sample in samples:
                if sample.rid in self._rids:
                    raise RequestError(
                        f"`rid` {sample.rid!r} is already in flight; choose another."
                    )
            for sample in samples:
                self._rids.setdefault(sample.rid, []).append(sample)

    def _release_rids(self, samples: list[SequenceRequest]) -> None:
        with self._rids_lock:
            for sample in samples:
                # By then the id may be another call's.
                if sample in self._rids.get(sample.rid, ()):
                    del self._rids[sample.rid]

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
