"""From a row and what became of it to a row of the output."""

from collections.abc import Mapping
from typing import Any

from jaxengine.serve import openai_api
from jaxengine.serve.batch.rows import Row


class ResultWriter:
    """Lays out results."""

    def __init__(self, *, output_ids: bool, created: int, model: str) -> None:
        """Args:
        output_ids: Report token ids.
        created: When the job began, for OpenAI's objects: a later run tells the same.
        model: Its name, for the same.
        """
        self._output_ids = output_ids
        self._created = created
        self._model = model

    def lay_out(self, row: Row, result: Any) -> dict[str, Any]:
        """The output row; `result` is what `generate` gives, or an exception."""
        error = None
        if isinstance(result, Exception):
            error = {"type": type(result).__name__, "message": str(result), "line": row.line}
        outputs: list[Any] = [] if error else result if isinstance(result, list) else [result]
        if row.is_openai:
            return self._openai(row, outputs, error)
        own: dict[str, Any] = dict.fromkeys(("text", "finish_reason", "seed", "usage"))
        if error is None:
            samples = _plural(self._samples(outputs), len(outputs))
            own = {**samples, "usage": _usage(row, outputs)}
        return {"id": row.key, **own, "error": error, **row.columns}

    def _samples(self, outputs: list[Mapping[str, Any]]) -> dict[str, list[Any]]:
        metas = [output["meta_info"] for output in outputs]
        samples: dict[str, list[Any]] = {
            "text": [output.get("text") for output in outputs],
            "finish_reason": [meta["finish_reason"]["type"] for meta in metas],
            "seed": [meta["seed"] for meta in metas],
        }
        if self._output_ids:
            samples["output_ids"] = [output["output_ids"] for output in outputs]
        return samples

    def _openai(
        self, row: Row, outputs: list[Mapping[str, Any]], error: dict[str, Any] | None
    ) -> dict[str, Any]:
        head = {"id": row.key, "custom_id": row.key}
        if error is not None or row.openai is None:
            return {**head, "response": None, "error": error}
        body = openai_api.answer(
            row.openai,
            outputs,
            id=f"cmpl-{row.key}",
            created=self._created,
            model=row.openai.model or self._model,
        )
        response = {"status_code": 200, "request_id": row.key, "body": body}
        return {**head, "response": response, "error": None}


def _plural(samples: Mapping[str, list[Any]], num: int) -> dict[str, Any]:
    """A value each for one sample, else lists."""
    if num == 1:
        return {name: values[0] for name, values in samples.items()}
    return {
        name if name == "output_ids" else f"{name}s": values for name, values in samples.items()
    }


def _usage(row: Row, outputs: list[Mapping[str, Any]]) -> dict[str, int]:
    metas = [output["meta_info"] for output in outputs]
    return {
        "prompt_tokens": metas[0]["prompt_tokens"],
        "completion_tokens": sum(meta["completion_tokens"] for meta in metas),
        "truncated_tokens": row.num_truncated,
    }
