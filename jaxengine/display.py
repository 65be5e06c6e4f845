"""Outputs as a notebook shows them: the text, its tokens coloured by how likely they were."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

UNLIKELY, UNCERTAIN = "214, 90, 40", "60, 110, 200"
"""Red, green and blue behind tokens that were improbable, or drawn from a wide distribution."""

STRONGEST = 0.6
"""Opacity of the strongest colour: the text stays readable on light and dark pages."""


class Output(dict[str, Any]):
    """What `generate` gives: a plain dict that notebooks show as `show` does."""

    def _repr_html_(self) -> str:
        return _block(self, None, None)


class Shown:
    """Outputs to look at."""

    def __init__(self, outputs: Sequence[Mapping[str, Any]], by: str | None, tokenizer: Any):
        self._outputs, self._by, self._tokenizer = outputs, by, tokenizer

    def _repr_html_(self) -> str:
        return "".join(_block(output, self._by, self._tokenizer) for output in self._outputs)

    def __repr__(self) -> str:
        return "\n---\n".join(
            str(output.get("text", output["output_ids"])) for output in self._outputs
        )


def show(outputs: Any, *, by: str | None = None, tokenizer: Any = None) -> Shown:
    """Shows outputs in a notebook, their tokens coloured.

    Args:
      outputs: An output of `generate`, or a list of them.
      by: "logprob" needs `return_logprob=True`: the less likely a token, the stronger its colour.
        Any other name is one of `capture`, such as "entropy": the larger, the stronger, up to the
        largest of the output. None takes the entropy where it was captured, else the logprob.
      tokenizer: Gives the tokens' texts; not needed with `return_text_in_logprobs=True`.

    Raises:
      ValueError: If an output has no such numbers.
    """
    outputs = [outputs] if isinstance(outputs, Mapping) else list(outputs)
    for output in outputs:
        if by not in (None, "logprob") and by not in output.get("captures", {}):
            raise ValueError(
                f"There is no {by!r} in the output's captures; pass capture={{{by!r}: fn}} to "
                '`generate`, or by="logprob".'
            )
        if by == "logprob" and "output_token_logprobs" not in output["meta_info"]:
            raise ValueError("There are no logprobs; pass return_logprob=True to `generate`.")
    return Shown(outputs, by, tokenizer)


def _block(output: Mapping[str, Any], by: str | None, tokenizer: Any) -> str:
    meta = output["meta_info"]
    pieces = _tokens(output, by, tokenizer)
    body = html.escape(str(output.get("text", output["output_ids"]))) if pieces is None else pieces
    reason = (meta.get("finish_reason") or {}).get("type", "running")
    foot = f"{meta['completion_tokens']} tokens, {reason}, seed {meta['seed']}"
    return (
        '<div style="border-left: 3px solid #8886; padding: 0.2em 0.8em; margin: 0.4em 0">'
        f'<div style="white-space: pre-wrap; font-family: monospace">{body}</div>'
        f'<div style="opacity: 0.6; font-size: 85%">{html.escape(foot)}</div></div>'
    )


def _tokens(output: Mapping[str, Any], by: str | None, tokenizer: Any) -> str | None:
    """The tokens as spans; None where their texts or numbers are not known."""
    triples = output["meta_info"].get("output_token_logprobs")
    captures = output.get("captures", {})
    if by is None:
        by = "entropy" if "entropy" in captures else "logprob"
    ids = output["output_ids"]
    if tokenizer is not None:
        texts = [tokenizer.decode([token_id]) for token_id in ids]
    elif triples and all(text is not None for _, _, text in triples):
        texts = [text for _, _, text in triples]
    else:
        return None
    if by == "logprob":
        if not triples:
            return None
        values = [logprob for logprob, _, _ in triples]
        shares, colour = [1 - math.exp(min(0.0, value)) for value in values], UNLIKELY
    else:
        values = [float(value) for value in captures[by]]
        most = max(map(abs, values), default=0.0) or 1.0
        shares, colour = [abs(value) / most for value in values], UNCERTAIN
    return "".join(
        _span(text, f"{text!r} (id {token_id}): {by} {value:.3f}", colour, share)
        for text, token_id, value, share in zip(texts, ids, values, shares, strict=True)
    )


def _span(text: str, title: str, colour: str, share: float) -> str:
    background = f"rgba({colour}, {STRONGEST * share:.2f})"
    # A line break has no width of its own to colour.
    shown = html.escape(text).replace("\n", "↵\n")
    return f'<span title="{html.escape(title)}" style="background: {background}">{shown}</span>'
