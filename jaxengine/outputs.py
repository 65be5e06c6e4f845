"""From a sequence's tokens to SGLang's output dicts. Runs in the text thread."""

import contextlib
import time
from collections.abc import Sequence
from typing import Any

from jaxengine.channel import Channel
from jaxengine.display import Output
from jaxengine.hidden import HiddenCollector
from jaxengine.reports import Decode, MetaInfo, Reports
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.types import HIDDEN, SequenceRequest, SequenceUpdate, StopReason


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
        decode: Decode | None,
        weight_versions: Sequence[str],
        returns_errors: bool = False,
        hidden: HiddenCollector | None = None,
        stream_interval: int = 1,
        is_incremental: bool = False,
        has_prompt_ids: bool = False,
    ) -> None:
        """Args:
        request: The sample.
        channel: Where outputs go.
        index: Place of the sample among the call's.
        detokenizer: None when ids are all that is wanted.
        has_stop_strings: Text must be looked at as it comes.
        decode: Gives a token's text, where logprobs are to carry it.
        weight_versions: Names of all weights the engine has had, by their ids; grows.
        returns_errors: An error becomes an output, instead of being put itself.
        hidden: Collects hidden states, where they are wanted.
        stream_interval: Tokens between two outputs of a stream, at least; the first comes at once.
        is_incremental: Outputs of a stream hold what is new alone.
        has_prompt_ids: Outputs carry the prompt's token ids.
        """
        self._request = request
        self._channel = channel
        self._index = index
        self._detokenizer = detokenizer
        self._watches_text = has_stop_strings or request.is_streaming
        self._weight_versions = weight_versions
        self._weights_ids: tuple[tuple[int, int], ...] = ()
        self._returns_errors = returns_errors
        self._hidden = hidden
        self._stream_interval = stream_interval
        self._is_incremental = is_incremental
        self._has_prompt_ids = has_prompt_ids
        self._num_given = 0
        self._ending: StopReason | None = None
        self._ids: list[int] = []
        self._reports = Reports(request, decode)
        self._num_decoded = 0
        self._delta_text = ""
        self._was_answered = False
        self._started = time.perf_counter()

    def push(self, update: SequenceUpdate) -> bool:
        """Takes what a step brought; False when a stop string ended the text."""
        if update.error is not None:
            self._push_error(update, update.error)
            return True
        if self._hidden is not None:
            for leaves in (update.prompt_leaves, update.leaves):
                self._hidden.push(leaves.get(HIDDEN))
        finish = self._ending or self._take(update)
        if finish is not None and not (update.finish or self._ending) and self._lacks_state():
            self._ending = finish  # the next step feeds the last token and brings its state
            return True
        if finish is None and not self._is_due():
            return True
        self._put(self._output(finish, update), is_last=finish is not None)
        return finish is update.finish

    def _take(self, update: SequenceUpdate) -> StopReason | None:
        self._ids += update.token_ids
        self._note_weights(update)
        self._reports.push(update)
        return self._read_text(update.finish)

    def _is_due(self) -> bool:
        """A stream's reader is to hear of the tokens so far."""
        num_new = len(self._ids) - self._num_given
        wanted = self._stream_interval if self._num_given else 1
        return self._request.is_streaming and num_new >= wanted

    def _lacks_state(self) -> bool:
        """The hidden state of the last token is still to come."""
        if self._hidden is None:
            return False
        return self._hidden.num_tokens < len(self._request.prompt_ids) + len(self._ids)

    def _push_error(self, update: SequenceUpdate, error: Exception) -> None:
        if not self._returns_errors:
            self._channel.put((self._index, error, True))
            return
        reason = StopReason.of_error(error)
        self._hidden = None
        # The error may be the detokenizer's own; then the text ends where it was before.
        with contextlib.suppress(Exception):
            self._read_text(reason)
        failed = {"error": {"type": reason.err_type, "message": reason.message}}
        self._put(self._output(reason, update) | failed, is_last=True)

    def _put(self, output: dict[str, Any], *, is_last: bool) -> None:
        if self._request.is_streaming:
            if self._detokenizer is not None:
                output["delta_text"] = self._delta_text
            output["delta_ids"] = self._ids[self._num_given :]
            if self._is_incremental:
                output |= {
                    old: output[new]
                    for old, new in (("text", "delta_text"), ("output_ids", "delta_ids"))
                    if new in output
                }
        self._delta_text = ""
        self._num_given = len(self._ids)
        self._channel.put((self._index, output, is_last))

    def _read_text(self, finish: StopReason | None) -> StopReason | None:
        """Decodes new ids where text is wanted now; a stop string found becomes the reason."""
        text = self._detokenizer
        if text is None or not (self._watches_text or finish):
            return finish
        is_stop_token = finish is not None and finish.type == "stop"
        self._delta_text += text.push(self._ids[self._num_decoded :], is_stopped=is_stop_token)
        self._num_decoded = len(self._ids)
        if text.matched is not None:
            # Tokens drawn after the match are dropped: the user sees what step-by-step would give.
            del self._ids[text.num_tokens :]
            self._reports.cut(text.num_tokens)
            return StopReason("stop", matched=text.matched)
        if finish is not None:
            self._delta_text += text.finish()
        return finish

    def _note_weights(self, update: SequenceUpdate) -> None:
        """Remembers with which weights tokens were drawn, as (id, first token) of every change."""
        if update.token_ids:
            if not self._weights_ids or self._weights_ids[-1][0] != update.weights_id:
                first = len(self._ids) - len(update.token_ids)
                self._weights_ids += ((update.weights_id, first),)

    def _weight_version(self) -> str:
        """Of the last token; the engine's where there is none."""
        used = [weights_id for weights_id, first in self._weights_ids if first < len(self._ids)]
        return self._weight_versions[used[-1] if used else -1]

    def _token_versions(self) -> list[str]:
        ends = [first for _, first in self._weights_ids[1:]] + [len(self._ids)]
        return [
            self._weight_versions[weights_id]
            for (weights_id, first), end in zip(self._weights_ids, ends, strict=True)
            for _ in range(first, end)
        ]

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
            "weight_version": self._weight_version(),
            "num_retractions": update.num_retractions,
            "seed": request.seed,
        }
        first = self._num_given if self._is_incremental else 0
        lists = self._reports.logprobs(first)
        if lists:
            meta["output_token_logprobs_length"] = lists["output_token_logprobs"].end
        if len(self._weights_ids) > 1:
            meta["output_weight_versions"] = self._token_versions()[first:]
        if finish is not None:
            meta["e2e_latency"] = now - self._started
            if self._hidden is not None:
                meta["hidden_states"] = self._hidden.result(
                    len(request.prompt_ids) + len(self._ids)
                )
        if not self._was_answered:
            meta["response_sent_to_client_ts"] = time.time()
            self._was_answered = True
        output = Output()
        if self._detokenizer is not None:
            output["text"] = self._detokenizer.text
        output |= {"output_ids": self._ids.copy(), "meta_info": MetaInfo(meta, lists)}
        if self._has_prompt_ids:
            output["prompt_token_ids"] = request.prompt_ids.tolist()
        if captures := self._reports.captures(first):
            output["captures"] = captures
        return output
