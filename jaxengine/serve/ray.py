"""Ray Data: an engine in each actor of `map_batches`; and an engine for Ray's own SGLang stage.

>>> from jaxengine.serve.ray import ENGINE_ACTORS, Generate
>>> dataset.map_batches(
...     Generate,
...     fn_constructor_kwargs={"model_path": ..., "sampling_params": {"seed": 0}},
...     batch_format="pyarrow", batch_size=256, compute=ray.data.ActorPoolStrategy(size=8),
...     num_gpus=1, **ENGINE_ACTORS,
... )

Rows and results are those of batch jobs over Parquet, see `jaxengine.serve.batch`: an error is a
value of the column `error`, and noise derives from the row's id or content. So a row that is
computed again, since its actor died, gives the same. Rows without an id and with equal content give
equal samples here, for no actor sees all of them.
"""

import sys
import types
from collections.abc import AsyncIterator
from typing import Any

import jaxengine
from jaxengine.params import fresh_seed
from jaxengine.serve.batch.config import BatchConfig
from jaxengine.serve.batch.parts import schema_of, table_of
from jaxengine.serve.batch.read import Record
from jaxengine.serve.batch.results import ResultWriter
from jaxengine.serve.batch.rows import RowReader, max_tokens, passed_fields

ENGINE_ACTORS: dict[str, Any] = {"max_concurrency": 4}
"""Options of the actors: batches that overlap in one, so that no engine waits for a last row."""


class Generate:
    """A stage for `map_batches` with `batch_format="pyarrow"`: an engine, rows async inside it."""

    def __init__(
        self,
        model_path: str,
        *,
        sampling_params: dict[str, Any] | None = None,
        engine_settings: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Starts the engine, in the actor.

        Args:
          model_path: As for `Engine`.
          sampling_params: For all rows. Without a seed every actor draws its own, and what is
            computed again differs.
          engine_settings: Further settings of the engine.
          **settings: Of `BatchConfig`, as far as they concern single rows.
        """
        self._config = BatchConfig(sampling_params=sampling_params or {}, **settings)
        self._params = {"seed": fresh_seed(), **self._config.sampling_params}
        self._engine = jaxengine.Engine(model_path=model_path, **(engine_settings or {}))
        self._writer = ResultWriter(output_ids=self._config.output_ids, created=0, model="")

    async def __call__(self, batch: Any) -> AsyncIterator[Any]:
        """Gives the batch's results, as one table, when all of them are there."""
        reader = RowReader(
            self._config,
            self._engine.tokenizer,
            max_tokens(self._engine),
            _NoKeys(),
            self._params,
            is_typed=True,
        )
        records = (Record(line, row) for line, row in enumerate(batch.to_pylist(), start=1))
        rows = list(reader.read(records))
        items = [row.error or row.arguments for row in rows]
        in_order = self._engine.aimap(items, max_in_flight=len(items) or 1, on_error="return")
        outputs = [output async for output in in_order]
        results = [self._writer.lay_out(*pair) for pair in zip(rows, outputs, strict=True)]
        yield table_of(results, schema_of(passed_fields(batch.schema, self._config)))

    def __del__(self) -> None:
        if hasattr(self, "_engine"):
            self._engine.shutdown()


def install_as_sglang() -> None:
    """Lets `import sglang` find this engine, for Ray's `SGLangEngineProcessorConfig`.

    It goes to the workers, where it hides an SGLang that is installed:
    `ray.init(runtime_env={"worker_process_setup_hook": install_as_sglang})`.
    """
    module = types.ModuleType("sglang", "jaxengine, under the name that Ray's stage imports.")
    module.__dict__["Engine"] = jaxengine.Engine
    sys.modules["sglang"] = module


class _NoKeys:
    """Counts nothing: a batch does not know what other batches hold."""

    def count(self, key: str) -> int:
        """Every row is the first with its id."""
        return 0
