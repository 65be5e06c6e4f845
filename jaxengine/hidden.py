"""Hidden states of one sample on the host: collected as they come, given in the form asked for.

Numpy only; runs in the text thread.
"""

from typing import Any

import numpy as np

from jaxengine.types import HiddenFormat, HiddenStates


class HiddenCollector:
    """Takes the hidden states of a sample's tokens in their order.

    Attributes:
      num_tokens: Tokens of the text up to the last whose state is there.
    """

    def __init__(
        self,
        which: HiddenStates,
        form: HiddenFormat,
        prompt_len: int,
        max_new_tokens: int,
        *,
        may_be_cut: bool,
    ) -> None:
        """Starts with none.

        Args:
          which: "all" tokens, the "last" one, or the "mean" over all.
          form: "numpy" is float32 [tokens, D] (or [D]); "sglang" is SGLang's nested list.
          prompt_len: Tokens of the prompt.
          max_new_tokens: Most tokens that will follow.
          may_be_cut: States may come of tokens that the text then does not have.
        """
        self._which, self._form, self._prompt_len = which, form, prompt_len
        self._most = prompt_len + max_new_tokens
        # Thousands of long texts may be encoded at once: no more is kept than is asked for.
        self._keeps_all = which == "all" or may_be_cut
        self.num_tokens = prompt_len - 1 if which == "last" else 0
        self._first = self.num_tokens
        self._states: np.ndarray | None = None

    def push(self, states: np.ndarray | None) -> None:
        """Takes the states [n, ...] of the next tokens; None for none."""
        if states is None or not len(states):
            return
        kept = self._states
        if kept is None:
            # Room for all, of which the system gives only what is written: no copy at the end.
            rows = self._most - self._first if self._keeps_all else 1
            self._states = kept = np.empty((rows, *states.shape[1:]), np.float32)
            kept[:1] = 0
        if self._keeps_all:
            start = self.num_tokens - self._first
            kept[start : start + len(states)] = states
        elif self._which == "last":
            kept[0] = states[-1]
        else:
            kept[0] += states.astype(np.float32).sum(axis=0)
        self.num_tokens += len(states)

    def result(self, num_tokens: int) -> Any:
        """What `meta_info["hidden_states"]` is.

        Args:
          num_tokens: Tokens the text has.
        """
        if self._states is None:  # ended before its first step
            return np.zeros((0, 0), np.float32) if self._form == "numpy" else []
        num_tokens = min(num_tokens, self.num_tokens)
        states = self._states
        if self._keeps_all:
            states = states[: num_tokens - self._first]
        if self._which == "mean":
            states = states.sum(axis=0, keepdims=True) / num_tokens
        if self._form == "sglang":
            return self._as_lists(states)
        return states if self._which == "all" else states[-1]

    def _as_lists(self, states: np.ndarray) -> list[Any]:
        """The prompt's states as one element, then one each output token, but for the last."""
        if self._which != "all":
            return states[-1:].tolist()
        prompt, outputs = states[: self._prompt_len], states[self._prompt_len : -1]
        return [prompt.tolist(), *outputs.tolist()]
