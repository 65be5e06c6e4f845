"""From a sequence's tokens to SGLang's output dicts. Runs in the text thread."""

import time
from typing import Any

from jaxengine.channel import Channel
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.types import SequenceRequest, SequenceUpdate, StopReason


class SequenceOutput:
    """Assembles one sample's outputs and puts them into its call's channel.

    What is put is `(index, dict or exception, is_last)`.
    """

    def __init__(
        self,
        request: SequenceRequest,
        channel: Channel,
        *,
        index: int,
        detokenizer: Detokenizer | None,
        has_stop_strings: bool,
        weight_version: str,
    ) -> None:
        """Args:
        request: The sample.
        channel: Where outputs go.
        index: Place of the sample among the call's.
        detokenizer: None when ids are all that is wanted.
        has_stop_strings: Text must be looked at as it comes.
        weight_version: Reported with every output.
        """
        self._request = request
        self._channel = channel
        self._index = index
        self._detokenizer = detokenizer
        self._watches_text = has_stop_strings or request.is_streaming
        self._weight_version = weight_version
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._undecoded: list[int] = []
        self._delta_text = ""
        self._was_answered = False
        self._started = time.perf_counter()

    def push(self, update: SequenceUpdate) -> bool:
        """Takes what a step brought; False when a stop string ended the text."""
        if update.error is not None:
            self._channel.put((self._index, update.error, True))
            return True
        num_before = len(self._ids)
        self._ids += update.token_ids
        self._logprobs += update.logprobs
        self._undecoded += update.token_ids
        finish = self._read_text(update.finish)
        if finish is None and not (self._request.is_streaming and update.token_ids):
            return True
        output = self._output(finish, update)
        if self._request.is_streaming:
            output["delta_text"] = self._delta_text
            output["delta_ids"] = self._ids[num_before:]
            if self._detokenizer is None:
                del output["delta_text"]
        self._delta_text = ""
        self._channel.put((self._index, output, finish is not None))
        return finish is update.finish

    def _read_text(self, finish: StopReason | None) -> StopReason | None:
        """Decodes new ids where text is wanted now; a stop string found becomes the reason."""
        text = self._detokenizer
        if text is None or not (self._watches_text or finish):
            return finish
        is_stop_token = finish is not None and finish.type == "stop"
        self._delta_text += text.push(self._undecoded, is_stopped=is_stop_token)
        self._undecoded = []
        if text.matched is not None:
            # Tokens drawn after the match are dropped: the user sees what step-by-step would give.
            del self._ids[text.num_tokens :]
            del self._logprobs[text.num_tokens :]
            return StopReason("stop", matched=text.matched)
        if finish is not None:
            self._delta_text += text.finish()
        return finish

    def _output(self, finish: StopReason | None, update: SequenceUpdate) -> dict[str, Any]:
        request = self._request
        now = time.perf_counter()
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": None if finish is None else finish.to_dict(),
            "prompt_tokens": len(request.prompt_ids),
            "completion_tokens": len(self._ids),
            "cached_tokens": update.cached_tokens,
            "reasoning_tokens": 0,
            "weight_version": self._weight_version,
            "num_retractions": update.num_retractions,
            "seed": request.seed,
        }
        if request.wants_logprobs:
            pairs = zip(self._logprobs, self._ids, strict=True)
            meta["input_token_logprobs"] = []
            meta["output_token_logprobs"] = [(logprob, i, None) for logprob, i in pairs]
            meta["output_token_logprobs_length"] = len(self._ids)
        if finish is not None:
            meta["e2e_latency"] = now - self._started
        if not self._was_answered:
            meta["response_sent_to_client_ts"] = time.time()
            self._was_answered = True
        output: dict[str, Any] = {}
        if self._detokenizer is not None:
            output["text"] = self._detokenizer.text
        return {**output, "output_ids": self._ids.copy(), "meta_info": meta}
