"""Names of the output's columns, and of those that are passed through beside them."""

from collections.abc import Iterable

OWN_COLUMNS = (
    "id",
    "text",
    "texts",
    "output_ids",
    "finish_reason",
    "finish_reasons",
    "seed",
    "seeds",
    "usage",
    "error",
)
"""Columns of the output; one of the input with such a name is passed through as `input_NAME`."""


def passed_names(names: Iterable[str]) -> dict[str, str]:
    """Old to new names of an input's columns; no two are the same, and none is one of ours."""
    taken = {*OWN_COLUMNS, "custom_id", "input", "response"}
    renamed = {}
    for old in names:
        new = old
        while new in taken:
            new = f"input_{new}"
        taken.add(new)
        renamed[old] = new
    return renamed
