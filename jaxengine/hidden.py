"""Hidden states of one sample on the host: collected as they come, given in the form asked for.

Numpy only; runs in the text thread.
"""

from typing import Any, Literal

import numpy as np

from jaxengine.types import HiddenStates

type HiddenFormat = Literal["numpy", "sglang"]


class HiddenCollector:
    """Takes the hidden states of a sample's tokens in their order."""

    def __init__(self, which: HiddenStates, form: HiddenFormat, prompt_len: int) -> None:
        """Starts with none.

        Args:
          which: "all" tokens, the "last" one, or the "mean" over all.
          form: "numpy" is float32 [tokens, D] (or [D]); "sglang" is SGLang's nested list.
          prompt_len: Tokens of the prompt.
        """
        self._which, self._form, self._prompt_len = which, form, prompt_len
        self._parts: list[np.ndarray] = []
        self.num_tokens = prompt_len - 1 if which == "last" else 0

    def push(self, states: np.ndarray) -> None:
        """Takes the states [n, ...] of the next tokens."""
        if not len(states):
            return
        self.num_tokens += len(states)
        if self._which == "last":
            self._parts = [states[-1:]]
        elif self._which == "mean":
            total = as_float32(states).sum(axis=0, keepdims=True)
            self._parts = [sum(self._parts, total)]
        else:
            self._parts.append(states)

    def cut(self, num_tokens: int) -> None:
        """Drops the states of tokens after so many; only where all were collected."""
        surplus = self.num_tokens - num_tokens
        if self._which == "all" and surplus > 0:
            self._parts = [np.concatenate(self._parts)[:num_tokens]]
            self.num_tokens = num_tokens

    def result(self) -> Any:
        """What `meta_info["hidden_states"]` is."""
        states = as_float32(np.concatenate(self._parts))
        if self._which == "mean":
            states = states / self.num_tokens
        if self._form == "sglang":
            return self._as_lists(states)
        return states if self._which == "all" else states[0]

    def _as_lists(self, states: np.ndarray) -> list[Any]:
        """The prompt's states as one element, then one each output token, but for the last."""
        if self._which != "all":
            return states.tolist()
        prompt, outputs = states[: self._prompt_len], states[self._prompt_len : -1]
        return [prompt.tolist(), *outputs.tolist()]


def as_float32(states: np.ndarray) -> np.ndarray:
    """Float32 of any float dtype."""
    return states.astype(np.float32, copy=False)
