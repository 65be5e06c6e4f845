"""What is reported of a sequence's tokens beside themselves: logprobs and captures.

Logprobs stay the arrays they came in until someone reads SGLang's lists of tuples: at batch 256
with twenty a token these are millions of objects, and to make them would hold up the engine thread.
"""

import threading
from collections.abc import Callable, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from jaxengine.types import CAPTURES, SequenceRequest, SequenceUpdate

type Decode = Callable[[int], str]


class LogprobArrays(NamedTuple):
    """Logprobs of consecutive tokens.

    Attributes:
      logprobs: float32 [tokens], or [tokens, count] where several are listed of each.
      ids: The token ids they belong to, of the same shape.
    """

    logprobs: np.ndarray
    ids: np.ndarray


class LogprobList:
    """One list of `meta_info`, which grows with the sequence.

    The text thread adds arrays; a reader's thread makes items of them, each once, however many
    outputs of a stream show it.
    """

    def __init__(self, decode: Decode | None = None, *, has_ids: bool = True) -> None:
        """Args:
        decode: Gives a token's text, where the tuples are to carry it.
        has_ids: Items are SGLang's tuples (logprob, id, text) or lists of them, else bare numbers.
        """
        self._decode = decode
        self._has_ids = has_ids
        self._parts: list[LogprobArrays] = []
        self._num_head = self._num_items = 0
        self._made: list[Any] = []
        self._num_made_parts = 0
        self._making = threading.Lock()

    def __len__(self) -> int:
        return self._num_items

    def begin_with(self, item: Any) -> None:
        """Puts an item without a logprob in front, for the text's first token."""
        self._made, self._num_head, self._num_items = [item], 1, 1

    def push(self, logprobs: np.ndarray, ids: np.ndarray) -> None:
        """Adds what a step brought."""
        self._parts.append(LogprobArrays(logprobs, ids))
        self._num_items += len(logprobs)

    def first(self, count: int) -> "LogprobList":
        """The first so many items of one that began with a logprob, as a list of its own."""
        whole = self.arrays(0, count)
        other = LogprobList(self._decode, has_ids=self._has_ids)
        other.push(*whole)
        return other

    def arrays(self, start: int, end: int) -> LogprobArrays:
        """The numbers of some items; an item without a logprob is left out."""
        parts = self._parts.copy()
        if not parts:
            return LogprobArrays(np.zeros(0, np.float32), np.zeros(0, np.int32))
        span = slice(max(0, start - self._num_head), max(0, end - self._num_head))
        whole = (np.concatenate(arrays)[span] for arrays in zip(*parts, strict=True))
        return LogprobArrays(*whole)

    def items(self, start: int, end: int) -> list[Any]:
        """Some items, as SGLang has them."""
        with self._making:
            while len(self._made) < end:
                self._made += self._make(*self._parts[self._num_made_parts])
                self._num_made_parts += 1
            return self._made[start:end]

    def _make(self, logprobs: np.ndarray, ids: np.ndarray) -> list[Any]:
        if not self._has_ids:
            return logprobs.tolist()
        if logprobs.ndim == 1:
            return self._triples(logprobs.tolist(), ids.tolist())
        return list(map(self._triples, logprobs.tolist(), ids.tolist()))

    def _triples(
        self, logprobs: list[float], ids: list[int]
    ) -> list[tuple[float, int, str | None]]:
        texts = repeat(None) if self._decode is None else map(self._decode, ids)
        return list(zip(logprobs, ids, texts, strict=False))


class LogprobSpan(NamedTuple):
    """Some items of a list, as they were when an output was made.

    Attributes:
      source: The list, which may have grown since.
      start: The first item.
      end: After the last.
    """

    source: LogprobList
    start: int
    end: int


def _once_made(method: Any) -> Any:
    """A method of dict, called when the lists of all its arguments have been made."""

    def call(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, MetaInfo):
                for name in arg:
                    arg[name]
        return method(*args)

    return call


class MetaInfo(dict[str, Any]):
    """`meta_info` of an output: a dict whose lists of logprobs are made when they are first read.

    Whoever reads it finds plain lists; `arrays` has the same numbers without them.
    """

    def __init__(self, values: Mapping[str, Any], lists: Mapping[str, LogprobSpan] = {}) -> None:
        """Takes the values, and what other values are made of."""
        super().__init__(values)
        super().update(lists)
        self._lists = lists

    def arrays(self, name: str) -> LogprobArrays:
        """The numbers of a list of logprobs, such as "output_top_logprobs", as numpy.

        Of prompt tokens, the text's first has none and is left out.

        Raises:
          KeyError: If there is no such list.
        """
        source, start, end = self._lists[name]
        return source.arrays(start, end)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if isinstance(value, LogprobSpan):
            value = value.source.items(value.start, value.end)
            self[name] = value
        return value

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[name] if name in self else default

    # With an `__iter__` of its own, `dict(meta)` and `{**meta}` ask for every item.
    def __iter__(self) -> Any:
        return super().__iter__()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    items, values, copy = _once_made(dict.items), _once_made(dict.values), _once_made(dict.copy)
    pop, popitem = _once_made(dict.pop), _once_made(dict.popitem)
    setdefault = _once_made(dict.setdefault)
    __eq__, __ne__ = _once_made(dict.__eq__), _once_made(dict.__ne__)
    __or__, __ror__ = _once_made(dict.__or__), _once_made(dict.__ror__)
    __repr__ = _once_made(dict.__repr__)


class Reports:
    """Collects what the steps of one sequence report."""

    def __init__(self, request: SequenceRequest, decode: Decode | None) -> None:
        """Args:
        request: The sample.
        decode: Gives a token's text, where logprobs are to carry it.
        """
        self._request = request
        self._decode = decode
        self._captures: dict[str, list[np.ndarray]] = {}
        self._output: dict[str, LogprobList] = {}
        self._input: dict[str, LogprobList] = {}
        if request.wants_logprobs:
            kinds = ["token", *["top"] * bool(request.num_top_logprobs)]
            kinds += ["token_ids"] * bool(request.logprob_ids)
            self._input = {kind: LogprobList(decode) for kind in kinds}
            self._output = {kind: LogprobList(decode) for kind in kinds}
            for kind in ("token_raw", "token_processed"):
                self._output[kind] = LogprobList(has_ids=False)

    def push(self, update: SequenceUpdate) -> None:
        """Takes what a step brought."""
        leaves = update.leaves
        if self._output and len(leaves.get("token", ())):
            self._push_tokens(self._output, leaves, leaves["token"])
            for kind in ("raw", "processed"):
                self._output[f"token_{kind}"].push(leaves[f"{kind}_logprob"], leaves["token"])
        # Hidden states of the prompt may come without its logprobs.
        if self._input and "logprob" in update.prompt_leaves:
            self._push_prompt(update.prompt_leaves)
        for name, leaf in leaves.items():
            if name.startswith(CAPTURES):
                self._captures.setdefault(name.removeprefix("capture/"), []).append(leaf)

    def cut(self, num_tokens: int) -> None:
        """Drops what is reported of output tokens after so many."""
        self._output = {kind: x.first(num_tokens) for kind, x in self._output.items()}
        self._captures = {name: [leaf[:num_tokens]] for name, leaf in self.captures().items()}

    def logprobs(self, first: int) -> dict[str, LogprobSpan]:
        """SGLang's lists of `meta_info`, and the token's logprob by the two other measures.

        Args:
          first: Output tokens from here on.
        """
        return {
            f"{side}_{kind}_logprobs": LogprobSpan(rows, start, len(rows))
            for side, lists, start in (("output", self._output, first), ("input", self._input, 0))
            for kind, rows in lists.items()
        }

    def captures(self, first: int = 0) -> dict[str, np.ndarray]:
        """Arrays [tokens, ...] by name, of output tokens from `first` on."""
        # Samples that end in the prefill and in a window bring several parts.
        return {name: np.concatenate(parts)[first:] for name, parts in self._captures.items()}

    def _push_prompt(self, leaves: Mapping[str, np.ndarray]) -> None:
        start, ids = self._request.logprob_start or 0, self._request.prompt_ids
        if start == 0 and not len(self._input["token"]):
            # Nothing comes before the first token, so it has no probability.
            text = None if self._decode is None else self._decode(int(ids[0]))
            for kind, rows in self._input.items():
                rows.begin_with((None, int(ids[0]), text) if kind == "token" else None)
        first = start + len(self._input["token"])
        self._push_tokens(self._input, leaves, ids[first : first + len(leaves["logprob"])])

    def _push_tokens(
        self,
        lists: Mapping[str, LogprobList],
        leaves: Mapping[str, np.ndarray],
        token_ids: np.ndarray,
    ) -> None:
        num_top, given = self._request.num_top_logprobs, self._request.logprob_ids
        lists["token"].push(leaves["logprob"], token_ids)
        if num_top:
            lists["top"].push(leaves["top_logprobs"][:, :num_top], leaves["top_ids"][:, :num_top])
        if given:
            logprobs = leaves["id_logprobs"][:, : len(given)]
            ids = np.broadcast_to(np.asarray(given, np.int32), logprobs.shape)
            lists["token_ids"].push(logprobs, ids)
