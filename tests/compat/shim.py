"""SGLang's HTTP bodies as calls: `/generate` takes a `GenerateReqInput` as JSON."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden" / "demo.safetensors"
"""Logits of the demo model by transformers."""


def generate(engine: Any, body: Mapping[str, Any]) -> Any:
    """What posting a body to `/generate` gives."""
    fields = dict(body)
    return engine.generate(fields.pop("text", None), **fields)
