"""Rows of a job as its engine will get them, and a look at them without an engine."""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.errors import RequestError
from jaxengine.serve.batch.config import BatchConfig, Report
from jaxengine.serve.batch.keys import Keys
from jaxengine.serve.batch.read import Record, format_of, read
from jaxengine.serve.batch.rows import Row, RowReader
from jaxengine.text.tokenizer import load_tokenizer

MAX_SHOWN_ERRORS = 20
"""Of these a dry run tells what is wrong; the others are counted."""


def dry_run(
    source: str | Path,
    *,
    model_path: str,
    engine_settings: dict[str, Any] | None = None,
    config: BatchConfig | None = None,
    **settings: Any,
) -> Report:
    """Checks every row and counts its tokens, with the tokenizer alone: no device is touched.

    Args:
      source: As for `run`.
      model_path: As for `Engine`.
      engine_settings: As for `run`; `context_length` is looked at.
      config: Settings of the job.
      **settings: The same, one by one.

    Returns:
      Rows, error rows and prompt tokens; what is wrong with the first ones is printed.
    """
    config = dataclasses.replace(config or BatchConfig(), **settings)
    engine_config = EngineConfig.from_kwargs({"model_path": model_path, **(engine_settings or {})})
    folder = folder_of(engine_config)
    model = model_config_of(folder)
    max_tokens = engine_config.context_length or model.max_position_embeddings
    tokenizer = load_tokenizer(engine_config.tokenizer_path or folder)
    report, started = Report(), time.perf_counter()
    with contextlib.closing(Keys()) as keys:
        reader = row_reader(str(source), config, tokenizer, max_tokens, keys, {})
        for row in reader.read(records_of(str(source), config)):
            report.num_rows += 1
            if (wrong := _what_is_wrong(row, model)) is not None:
                report.num_errors += 1
                if report.num_errors <= MAX_SHOWN_ERRORS:
                    print(wrong, file=sys.stderr)
                continue
            num_tokens = len(row.arguments["input_ids"])
            report.prompt_tokens += num_tokens
            report.max_prompt_tokens = max(report.max_prompt_tokens, num_tokens)
    report.seconds = time.perf_counter() - started
    return report


def _what_is_wrong(row: Row, model: ModelConfig) -> str | None:
    if row.error is not None:
        return str(row.error)  # it names the line
    try:
        check_request(row.arguments["sampling_params"], row.arguments["input_ids"], model)
    except RequestError as error:
        return f"Line {row.line}: {error}"
    return None


def check_request(params: Any, input_ids: Any, model: ModelConfig) -> None:
    """Checks a request as an engine with the built-in sampler would.

    Raises:
      RequestError: Says what is wrong with it.
    """
    from jaxengine.params import ParamsParser
    from jaxengine.requests import parse_call
    from jaxengine.sampling import default_sampler

    # Of a tokenizer only whether there is one counts here.
    specs = default_sampler().params
    parser = ParamsParser(specs, vocab_size=model.vocab_size, tokenizer=True)
    try:
        parse_call(
            {"sampling_params": params, "input_ids": input_ids},
            parser=parser,
            hidden_size=model.hidden_size,
            max_top_logprobs=0,
        )
    except TypeError as error:
        raise RequestError(str(error)) from error


def folder_of(config: EngineConfig) -> Path:
    """Where the checkpoint is."""
    from jaxengine.locate import locate  # brings jax, which a command's --help does not need

    return locate(config)


def model_config_of(folder: Path) -> ModelConfig:
    """Its shape."""
    from jaxengine.locate import read_model_config

    return read_model_config(folder)


def records_of(source: str, config: BatchConfig) -> Iterator[Record]:
    """The records of the input, up to the limit."""
    return itertools.islice(read(source, format_of(source, config.format)), config.limit)


def row_reader(
    source: str,
    config: BatchConfig,
    tokenizer: Any,
    max_tokens: int,
    keys: Keys,
    params: dict[str, Any],
) -> RowReader:
    """What makes them rows; see there."""
    is_typed = format_of(source, config.format) == "parquet"
    return RowReader(config, tokenizer, max_tokens, keys, params, is_typed=is_typed)
