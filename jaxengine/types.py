"""Values that cross room borders, and the dimension key. Knows nothing of jax.

Dimension key (shapes in annotations and name suffixes):
    B sequences in the step · T packed tokens · R rows of a prefill · P pages per sequence
    N query heads · K kv heads · H head dim · D model · F ffn · V vocab · L layers
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

MAX_STOP_TOKEN_IDS = 64
"""Most token ids that may end one request, EOS ids included."""

MAX_LOGPROB_IDS = 64
"""Most token ids whose logprobs one request may ask for."""

HIDDEN = "hidden"
"""Name of the leaf with hidden states, of prompt tokens and of tokens drawn."""

CAPTURES = ("aux", "capture/")
"""How the names of leaves begin that are reported whether logprobs are wanted or not."""

type HiddenStates = Literal["all", "last", "mean"]
"""Which hidden states a request reports: of every token, of the last, or their mean."""

type HiddenFormat = Literal["numpy", "sglang"]
"""In which form: an array, or SGLang's nested lists."""

DRAW_ERRORS = {
    -2: "the model gave NaN logits; check its weights and dtype",
    -3: "the sampler left no token to draw, or drew one outside the vocabulary",
}
"""What the device reports instead of a token, and what it means."""

NULL_PAGE = 0
"""Page 0 is never handed out: dead and padded rows write there, and its content is garbage."""


class Param(NamedTuple):
    """A per-request value a transform needs; it becomes a sampling-parameter key.

    Attributes:
      dtype: "float32" or "int32".
      default: Value of requests that do not set it.
      check: Returns an error clause ("must be in (0, 1]") for a bad value, else None.
      shape: Shape of the value; () for a scalar.
      pad: Fills the places of `shape` that a ragged value leaves empty.
      encode: `encode(value, tokenizer) -> array` of at most `shape`, for textual or ragged values.
    """

    dtype: Literal["float32", "int32"]
    default: Any
    check: Callable[[Any], str | None] = lambda _: None
    shape: tuple[int, ...] = ()
    pad: float = 0
    encode: Callable[[Any, Any], np.ndarray] | None = None


class StopReason(NamedTuple):
    """Why a sequence ended.

    Attributes:
      type: "stop", "length" or "abort".
      matched: Token id or stop string, for "stop".
      length: Effective `max_new_tokens`, for "length".
      message: For "abort".
      err_type: For an "abort" that stands for an error: the error's class.
    """

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    err_type: str | None = None

    @classmethod
    def of_error(cls, error: Exception) -> "StopReason":
        """What ended a request whose caller wants errors among its outputs."""
        return cls("abort", message=str(error), err_type=type(error).__name__)

    def to_dict(self) -> dict[str, Any]:
        """SGLang's `finish_reason` dict."""
        match self.type:
            case "stop":
                return {"type": "stop", "matched": self.matched}
            case "length":
                return {"type": "length", "length": self.length}
            case "abort":
                message = self.message or "Aborted"
                more = {"status_code": None, "err_type": self.err_type}
                return {"type": "abort", "message": message, **more}


class SequenceRequest(NamedTuple):
    """One sample of one prompt, as the engine core sees it: tokens, not text.

    Attributes:
      seq_id: Unique in the engine.
      rid: The request's public id, for messages.
      prompt_ids: Token ids, at least one.
      max_new_tokens: Limit on generated tokens, already clipped to the context and the pool.
      min_new_tokens: Stop tokens are masked until this many tokens were generated.
      stop_token_ids: Ids that end the sequence, EOS included.
      ignore_eos: No token ends the sequence, only its length.
      seed: Effective seed, in [0, 2**63).
      values: Sampler parameters that are given, by name, checked and encoded.
      sampler_id: Which of the engine's samplers draws.
      sampler: That sampler itself, held so that it lives, and not looked into.
      is_stateful: The sampler keeps a state of the tokens drawn so far, which cannot be had again
        once the device has lost it.
      companions: Prompts that are continued in lockstep with this one by the same tokens; they
        have ids of their own and report nothing.
      is_streaming: Someone reads tokens as they come, so windows stay short.
      wants_logprobs: Tokens carry their logprob.
      num_top_logprobs: Tokens carry those of this many most likely ones.
      logprob_ids: Tokens carry the logprobs of these ids.
      logprob_start: Prompt tokens from this one on carry theirs, the first token of all excepted;
        None for none. The prefix cache is used up to there.
      hidden_states: Which hidden states are reported, if any; those of all tokens leave the prefix
        cache unused for the prompt.
      embeds: Float [prompt tokens, D], what stands for the prompt's embeddings; its ids mean
        nothing then.
      cache_namespace: Prefixes are shared only among those with the same one; any hashable value.
      priority: Who is more urgent, where the policy asks for it.
      timeout_s: Longest time from its queueing to its end; None for no limit.
    """

    seq_id: int
    rid: str
    prompt_ids: np.ndarray
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    values: Mapping[str, Any] = {}
    sampler_id: int = 0
    sampler: Any = None
    is_stateful: bool = False
    companions: tuple["SequenceRequest", ...] = ()
    is_streaming: bool = False
    wants_logprobs: bool = False
    num_top_logprobs: int = 0
    logprob_ids: tuple[int, ...] = ()
    logprob_start: int | None = None
    hidden_states: HiddenStates | None = None
    embeds: np.ndarray | None = None
    cache_namespace: Hashable = None
    priority: int = 0
    timeout_s: float | None = None

    @property
    def wants_lists(self) -> bool:
        """Tokens carry logprobs of others than themselves."""
        return bool(self.num_top_logprobs or self.logprob_ids)

    @property
    def feeds_last(self) -> bool:
        """Its last token, too, is fed to the model, for its hidden state."""
        return self.hidden_states is not None and self.max_new_tokens > 0


class SequenceUpdate(NamedTuple):
    """What one commit brought for one sequence.

    Attributes:
      seq_id: Which sequence.
      token_ids: New tokens, in order; the stop token is included.
      leaves: What is reported of every new token, by name: arrays [new tokens, ...]; what is about
        logprobs only where they are wanted.
      prompt_leaves: The same of prompt tokens, in order.
      finish: Set on the last update of a sequence.
      error: Set instead of `finish` when the sequence failed.
      cached_tokens: Prompt tokens that were not computed, set on the last update.
      num_retractions: How often the sequence was preempted, set on the last update.
      weights_id: Which parameters the tokens were drawn with.
    """

    seq_id: int
    token_ids: list[int]
    leaves: Mapping[str, np.ndarray] = {}
    prompt_leaves: Mapping[str, np.ndarray] = {}
    finish: StopReason | None = None
    error: Exception | None = None
    cached_tokens: int = 0
    num_retractions: int = 0
    weights_id: int = 0
