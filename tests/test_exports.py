"""`__all__` of every module is sorted, and every name in it is there."""

import ast
import importlib
from pathlib import Path

import pytest

import jaxengine

ROOT = Path(__file__).parent.parent


def exports_of(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def modules_with_exports() -> list[tuple[str, list[str]]]:
    found = []
    for path in sorted([*ROOT.glob("jaxengine/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if (names := exports_of(path)) is not None:
            found.append((".".join(parts).removesuffix(".__init__"), names))
    return found


@pytest.mark.parametrize("module, names", modules_with_exports())
def test_exports_are_sorted_and_importable(module: str, names: list[str]):
    # CONSTANTS, then Classes, then the rest: the order ruff's RUF022 keeps.
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for name in names:
        assert getattr(importlib.import_module(module), name) is not None


def test_public_api_is_listed():
    assert set(jaxengine.__all__) <= set(dir(jaxengine))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = jaxengine.no_such_name
