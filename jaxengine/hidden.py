"""Hidden states of one sample on the host: collected as they come, given in the form asked for.

Numpy only; runs in the text thread.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxengine.types import HiddenFormat, HiddenStates


class HiddenCollector:
    """Takes the hidden states of a sample's tokens in their order.

    Attributes:
      num_tokens: Tokens of the text up to the last whose state is there.
    """

    def __init__(
        self, which: HiddenStates, form: HiddenFormat, prompt_len: int, *, may_be_cut: bool
    ) -> None:
        """Starts with none.

        Args:
          which: "all" tokens, the "last" one, or the "mean" over all.
          form: "numpy" is float32 [tokens, D] (or [D]); "sglang" is SGLang's nested list.
          prompt_len: Tokens of the prompt.
          may_be_cut: States may come of tokens that the text then does not have.
        """
        self._which, self._form, self._prompt_len = which, form, prompt_len
        self._may_be_cut = may_be_cut
        self._parts: list[np.ndarray] = []
        self.num_tokens = prompt_len - 1 if which == "last" else 0

    def push(self, states: np.ndarray | Sequence[Any]) -> None:
        """Takes the states [n, ...] of the next tokens."""
        if not isinstance(states, np.ndarray) or not len(states):
            return
        self.num_tokens += len(states)
        self._parts.append(states.astype(np.float32))
        if not self._may_be_cut and self._which != "all":
            # Thousands of long texts may be encoded at once: no more is kept than is asked for.
            reduced = np.concatenate(self._parts)
            self._parts = [reduced[-1:] if self._which == "last" else reduced.sum(0, keepdims=True)]

    def result(self, num_tokens: int) -> Any:
        """What `meta_info["hidden_states"]` is.

        Args:
          num_tokens: Tokens the text has.
        """
        if not self._parts:  # ended before its first step
            return np.zeros((0, 0), np.float32) if self._form == "numpy" else []
        surplus = max(0, self.num_tokens - num_tokens)
        states = np.concatenate(self._parts)
        states = states[: len(states) - surplus]
        if self._which == "mean":
            states = states.sum(axis=0, keepdims=True) / (self.num_tokens - surplus)
        if self._form == "sglang":
            return self._as_lists(states)
        return states if self._which == "all" else states[-1]

    def _as_lists(self, states: np.ndarray) -> list[Any]:
        """The prompt's states as one element, then one each output token, but for the last."""
        if self._which != "all":
            return states[-1:].tolist()
        prompt, outputs = states[: self._prompt_len], states[self._prompt_len : -1]
        return [prompt.tolist(), *outputs.tolist()]
