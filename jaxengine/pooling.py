"""What `encode` and `score` ask of `generate`, and how they read its outputs. Numpy only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxengine.errors import RequestError

ONE_STEP = {"max_new_tokens": 0, "temperature": 0}
"""Nothing is generated: a prompt is read, and what it gives is reported."""


class ScoreResult(list[list[float]]):
    """One list of label scores an item; the list that older SGLang gives, with newer's attributes.

    Attributes:
      prompt_tokens: Tokens of all prompts, cached ones included.
    """

    def __init__(self, scores: Sequence[list[float]], prompt_tokens: int) -> None:
        """Takes the scores, a list an item."""
        super().__init__(scores)
        self.prompt_tokens = prompt_tokens

    @property
    def scores(self) -> list[list[float]]:
        """The scores as a plain list."""
        return list(self)


def check_encode(pooling: Any, dimensions: Any, hidden_size: int) -> None:
    """Checks how states are pooled.

    Raises:
      RequestError: For an unknown pooling or dimensions out of range.
    """
    if pooling not in ("mean", "last"):
        raise RequestError(f'`pooling` must be "mean" or "last", got {pooling!r}.')
    is_int = isinstance(dimensions, int) and not isinstance(dimensions, bool)
    if dimensions is not None and not (is_int and 1 <= dimensions <= hidden_size):
        raise RequestError(
            f"`dimensions` must be an integer in [1, {hidden_size}], got {dimensions!r}."
        )


def read_embeddings(
    outputs: Any, *, normalize: bool, dimensions: int | None
) -> dict[str, Any] | list[dict[str, Any]]:
    """SGLang's embedding dicts of the outputs of a `generate` that reported pooled states."""
    if isinstance(outputs, list):
        return [_embedding(output, normalize, dimensions) for output in outputs]
    return _embedding(outputs, normalize, dimensions)


def _embedding(output: Mapping[str, Any], normalize: bool, dimensions: int | None) -> Any:
    meta = dict(output["meta_info"])
    vector = meta.pop("hidden_states")[..., :dimensions]
    if normalize:
        vector = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
    return {"embedding": vector, "meta_info": meta}


def score_prompts(query: Any, items: Any, label_token_ids: Any, item_first: bool) -> dict[str, Any]:
    """The `generate` keywords of a `score` call: one prompt an item.

    Raises:
      RequestError: For a mix of texts and ids, or no labels.
    """
    if label_token_ids is None or len(label_token_ids) == 0:
        raise RequestError("`label_token_ids` must be given: ids of the labels to score.")
    if items is not None and len(items) == 0:
        return {"prompt": []}
    if isinstance(query, str):
        texts = [items] if isinstance(items, str) else items
        if isinstance(texts, list | tuple) and all(isinstance(item, str) for item in texts):
            joined = [item + query if item_first else query + item for item in texts]
            return {"prompt": joined, "token_ids_logprob": label_token_ids}
    elif isinstance(items, list | tuple) and _is_ids(query) and all(map(_is_ids, items)):
        start = list(query)
        joined = [[*item, *start] if item_first else [*start, *item] for item in items]
        return {"input_ids": joined, "token_ids_logprob": label_token_ids}
    raise RequestError(
        "`query` and `items` must both be text (a string and a list of strings) or both be token "
        "ids (a list of ids and a list of such lists)."
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and not any(
        isinstance(token, str | list | tuple) for token in value
    )


def read_scores(outputs: list[dict[str, Any]], *, apply_softmax: bool) -> ScoreResult:
    """Probabilities of the labels as the next token; with softmax, among the labels alone."""
    scores = []
    for output in outputs:
        [labels] = output["meta_info"]["output_token_ids_logprobs"]
        p = np.exp(np.asarray([logprob for logprob, _, _ in labels], np.float64))
        scores.append((p / p.sum() if apply_softmax else p).tolist())
    return ScoreResult(scores, sum(o["meta_info"]["prompt_tokens"] for o in outputs))
