"""Ray Data on this machine, one of two actors killed; and the shapes of Ray's SGLang stage."""

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import jaxengine
from jaxengine.serve import batch
from jaxengine.serve.ray import ENGINE_ACTORS, Generate, install_as_sglang

ROOT = Path(__file__).parents[2]
PARAMS = {"seed": 4, "temperature": 1.0, "max_new_tokens": 4}
ROWS = [{"id": f"r{i}", "prompt": f"king {i}:\n" if i % 10 else "", "place": i} for i in range(60)]


def results_alone(demo: Any, tmp_path: Path) -> list[dict[str, Any]]:
    """The same rows as a batch job."""
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "in.parquet")
    batch.run(
        tmp_path / "in.parquet", tmp_path / "out.parquet", engine=demo, sampling_params=PARAMS
    )
    return pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()


def without_lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by their place, and errors without the line, which is the batch's in one of them."""
    for row in rows:
        if row["error"] is not None:
            row["error"] = row["error"]["type"]
    return sorted(rows, key=lambda row: row["place"])


def test_a_stage_gives_what_a_batch_job_gives(demo: Any, demo_settings: Any, tmp_path: Path):
    stage = Generate(jaxengine.DEMO_MODEL, sampling_params=PARAMS, engine_settings=demo_settings)
    table = pa.Table.from_pylist(ROWS)

    async def run() -> list[Any]:
        halves = [stage(table.slice(0, 30)), stage(table.slice(30))]
        return await asyncio.gather(*(anext(half) for half in halves))

    rows = [row for part in asyncio.run(run()) for row in part.to_pylist()]
    errors = [row["error"]["message"] for row in rows if row["error"] is not None]
    assert len(errors) == 6, errors[:2]
    assert without_lines(rows) == without_lines(results_alone(demo, tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_an_engine_fits_the_stage_that_ray_has_for_sglang(demo: Any, demo_settings: Any):
    install_as_sglang()
    try:
        # A private module of Ray's, which may move.
        stages = pytest.importorskip("ray.llm._internal.batch.stages.sglang_engine_stage")
        wrapper = stages.SGLangEngineWrapper("place", model=jaxengine.DEMO_MODEL, **demo_settings)
    finally:
        del sys.modules["sglang"]
    ids = demo.tokenizer("ROMEO:")["input_ids"]
    row = {"prompt": "ROMEO:", "tokenized_prompt": np.array(ids), "place": 3}
    _, output, _ = asyncio.run(wrapper.generate_async({**row, "sampling_params": PARAMS}))
    wrapper.shutdown()
    expected = demo.generate(input_ids=ids, sampling_params=PARAMS)
    assert output["generated_tokens"] == expected["output_ids"]
    assert output["num_input_tokens"] == len(ids)
    assert output["num_generated_tokens"] == 4


class Mortal(Generate):
    """Kills its process at its second batch, once in the life of the marker file."""

    def __init__(self, marker: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._marker, self._num_batches = Path(marker), 0

    async def __call__(self, batch: Any) -> Any:
        self._num_batches += 1
        if self._num_batches == 2 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        async for result in super().__call__(batch):
            yield result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(300)
def test_an_actor_that_is_killed_loses_no_row(
    demo: Any, demo_settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import ray.data  # not in all workers of the test run

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    # Ray starts as many idle processes as it has CPUs, and they take as long as the engines.
    ray.init(num_cpus=2, object_store_memory=100 << 20, **quiet)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        settings = {
            "model_path": jaxengine.DEMO_MODEL,
            "sampling_params": PARAMS,
            "engine_settings": demo_settings,
        }
        dataset = ray.data.from_items(ROWS, override_num_blocks=6).map_batches(
            Mortal,
            fn_constructor_kwargs={"marker": str(tmp_path / "killed"), **settings},
            batch_format="pyarrow",
            batch_size=10,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
            **ENGINE_ACTORS,
        )
        rows = dataset.take_all()
    finally:
        ray.shutdown()
    assert (tmp_path / "killed").exists()
    assert without_lines(rows) == without_lines(results_alone(demo, tmp_path))
