"""The cells of SGLang's offline engine documentation run here, word for word but for their imports.

As a script, and in a notebook kernel with and without nest_asyncio.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.engine.test_interpreter import ROOT, assert_success, run_script

CELLS = dict(
    re.findall(
        r"^\[(\d)\]:\n(.*?)(?=\n\[\d\]:|\Z)",
        (Path(__file__).parent / "sglang_cells.txt").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)


@pytest.fixture
def cells(settings: dict[str, Any], checkpoint: Path, engine: Any) -> list[str]:
    """All cells; the four that generate are as they were."""
    del engine  # it has filled the executable cache
    launch = CELLS["1"]
    arguments = f"model_path={str(checkpoint)!r}, **{settings}"
    for old, new in (
        ("import sglang as sgl", "import jaxengine as sgl"),
        ("import sglang.test.doc_patch  # noqa: F401\n", ""),
        ("from sglang.utils import", "from jaxengine.utils import"),
        ('model_path="qwen/qwen2.5-0.5b-instruct"', arguments),
    ):
        assert launch.count(old) == 1
        launch = launch.replace(old, new)
    return [launch, *(CELLS[number] for number in "23456")]


def assert_four_modes_ran(printed: str) -> None:
    for title in (
        "synchronous streaming generation with overlap removal",
        "asynchronous batch generation",
        "asynchronous streaming generation (no repeats)",
    ):
        assert printed.count(title) == 1
    assert printed.count("Prompt: ") == 4 + 3 + 3 + 3
    texts = re.findall(r"Generated text: ([^\n=]*)", printed)
    assert len(texts) == 13
    assert sum(bool(text.strip()) for text in texts) > 6


def test_cells_run_as_a_script(cells: list[str]):
    done = run_script("\n\n".join(cells))
    assert_success(done)
    assert_four_modes_ran(done.stdout)


def run_cells(cells: list[str]) -> str:
    """Runs the cells in a kernel; gives what they printed."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    return "".join(o.text for o in outputs if o.get("name") == "stdout")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cells_run_in_a_kernel_with_nest_asyncio(cells: list[str]):
    apply = "import nest_asyncio\n\nnest_asyncio.apply()"
    assert_four_modes_ran(run_cells([apply, *cells]))


AWAITING_CELLS = [
    """
params = {"temperature": 0, "max_new_tokens": 20}
whole = llm.generate("ROMEO:", params)["text"]
streamed = [chunk["delta_text"] for chunk in llm.generate("ROMEO:", params, stream=True)]
merged = stream_and_merge(llm, "ROMEO:", params)
""",
    """
awaited = (await llm.async_generate("ROMEO:", params))["text"]
async_streamed = [
    chunk["delta_text"]
    async for chunk in await llm.async_generate("ROMEO:", params, stream=True)
]
async_merged = [delta async for delta in async_stream_and_merge(llm, "ROMEO:", params)]
both = await asyncio.gather(*[llm.async_generate("ROMEO:", params) for _ in "ab"])
""",
    """
texts = [whole, "".join(streamed), merged, awaited, "".join(async_streamed)]
texts += ["".join(async_merged), *(output["text"] for output in both)]
print(len(whole) > 20, len(streamed) > 1, len(texts), len(set(texts)))
""",
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cells_of_a_kernel_need_no_nest_asyncio(cells: list[str]):
    launch, *_, shutdown = cells
    assert run_cells([launch, *AWAITING_CELLS, shutdown]) == "True True 8 1\n"
