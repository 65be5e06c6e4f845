"""Prompts that are read and not continued: embeddings and label scores, of what `generate` reports.

The functions are methods of `Engine`; they ask it for nothing but `generate`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import numpy as np

from jaxengine.errors import RequestError
from jaxengine.generate_arguments import RequestArguments
from jaxengine.sampling import default_sampler

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


def encode(
    engine: Any,
    prompt: Any = None,
    input_ids: Any = None,
    *,
    pooling: str = "last",
    normalize: bool = True,
    dimensions: int | None = None,
    **others: Unpack[RequestArguments],
) -> Any:
    """Gives embeddings of prompts, by the same model that generates.

    Args:
      prompt: A text, or a list of texts.
      input_ids: Token ids instead.
      pooling: "last", the hidden state of the last token, or "mean", over all tokens. For the
        first, beginnings that prompts share are computed once.
      normalize: Scales the embedding to length 1.
      dimensions: Keeps so many of its first entries, before that.
      **others: Of `generate`, such as `rid`.

    Returns:
      `{"embedding": float32 [hidden], "meta_info": {...}}` (SGLang: a list of floats), or a
      list of these.

    Raises:
      RequestError: For a bad argument.
    """
    _check_pooling(pooling, dimensions, engine.model_config.hidden_size)
    asked = {"return_hidden_states": pooling, "sampler": default_sampler(), **others}
    outputs = engine.generate(prompt, ONE_STEP, input_ids, **asked)
    return _embeddings(outputs, normalize=normalize, dimensions=dimensions)


async def async_encode(
    engine: Any,
    prompt: Any = None,
    input_ids: Any = None,
    *,
    pooling: str = "last",
    normalize: bool = True,
    dimensions: int | None = None,
    **others: Unpack[RequestArguments],
) -> Any:
    """`encode` for coroutines."""
    _check_pooling(pooling, dimensions, engine.model_config.hidden_size)
    asked = {"return_hidden_states": pooling, "sampler": default_sampler(), **others}
    outputs = await engine.async_generate(prompt, ONE_STEP, input_ids, **asked)
    return _embeddings(outputs, normalize=normalize, dimensions=dimensions)


def score(
    engine: Any,
    query: Any = None,
    items: Any = None,
    label_token_ids: Any = None,
    apply_softmax: bool = False,
    item_first: bool = False,
) -> ScoreResult:
    """Gives each item's probabilities of some tokens to come next.

    The query is computed once, where it comes first: the prefix cache has it for all items.

    Args:
      query: A text, or token ids.
      items: A text or a list of texts, or a list of lists of ids; each joins the query, as one
        text.
      label_token_ids: The tokens to score; at most 64.
      apply_softmax: Probabilities among these tokens, which sum to 1, instead of among all.
      item_first: The item stands before the query.

    Returns:
      A list of one list of probabilities an item, also its `scores`, with `prompt_tokens`.

    Raises:
      RequestError: For a mix of texts and ids, or a label outside the vocabulary.
    """
    asked = _score_arguments(query, items, label_token_ids, item_first)
    return _scores(engine.generate(**asked), apply_softmax=apply_softmax)


async def async_score(
    engine: Any,
    query: Any = None,
    items: Any = None,
    label_token_ids: Any = None,
    apply_softmax: bool = False,
    item_first: bool = False,
) -> ScoreResult:
    """`score` for coroutines."""
    asked = _score_arguments(query, items, label_token_ids, item_first)
    return _scores(await engine.async_generate(**asked), apply_softmax=apply_softmax)


def _check_pooling(pooling: Any, dimensions: Any, hidden_size: int) -> None:
    if pooling not in ("mean", "last"):
        raise RequestError(f'`pooling` must be "mean" or "last", got {pooling!r}.')
    is_int = isinstance(dimensions, int) and not isinstance(dimensions, bool)
    if dimensions is not None and not (is_int and 1 <= dimensions <= hidden_size):
        raise RequestError(
            f"`dimensions` must be an integer in [1, {hidden_size}], got {dimensions!r}."
        )


def _embeddings(
    outputs: Any, *, normalize: bool, dimensions: int | None
) -> dict[str, Any] | list[dict[str, Any]]:
    """SGLang's embedding dicts, of the pooled states that outputs report."""
    if isinstance(outputs, list):
        return [_embedding(output, normalize, dimensions) for output in outputs]
    return _embedding(outputs, normalize, dimensions)


def _embedding(output: Mapping[str, Any], normalize: bool, dimensions: int | None) -> Any:
    meta = dict(output["meta_info"])
    vector = meta.pop("hidden_states")[..., :dimensions]
    if normalize:
        vector = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
    return {"embedding": vector, "meta_info": meta}


def _score_arguments(
    query: Any, items: Any, label_token_ids: Any, item_first: bool
) -> dict[str, Any]:
    """Those of `generate` for a `score`: one prompt an item."""
    if label_token_ids is None or len(label_token_ids) == 0:
        raise RequestError("`label_token_ids` must be given: ids of the labels to score.")
    asked = {
        "sampling_params": ONE_STEP,
        "return_logprob": True,
        "token_ids_logprob": label_token_ids,
        "sampler": default_sampler(),
    }
    if items is not None and len(items) == 0:
        return {**asked, "prompt": []}
    if isinstance(query, str):
        texts = [items] if isinstance(items, str) else items
        if isinstance(texts, list | tuple) and all(isinstance(item, str) for item in texts):
            joined = [item + query if item_first else query + item for item in texts]
            return {**asked, "prompt": joined}
    elif isinstance(items, list | tuple) and _is_ids(query) and all(map(_is_ids, items)):
        start = list(query)
        joined = [[*item, *start] if item_first else [*start, *item] for item in items]
        return {**asked, "input_ids": joined}
    raise RequestError(
        "`query` and `items` must both be text (a string and a list of strings) or both be token "
        "ids (a list of ids and a list of such lists)."
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and not any(
        isinstance(token, str | list | tuple) for token in value
    )


def _scores(outputs: list[dict[str, Any]], *, apply_softmax: bool) -> ScoreResult:
    """Probabilities of the labels as the next token; with softmax, among the labels alone."""
    scores = []
    for output in outputs:
        [labels] = output["meta_info"]["output_token_ids_logprobs"]
        p = np.exp(np.asarray([logprob for logprob, _, _ in labels], np.float64))
        scores.append((p / p.sum() if apply_softmax else p).tolist())
    return ScoreResult(scores, sum(o["meta_info"]["prompt_tokens"] for o in outputs))
