"""What a batch job is asked to do, and what it reports at its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jaxengine.errors import ConfigError

FORMATS = ("jsonl", "parquet", "text")


class Shard(NamedTuple):
    """One of `count` parts of a job; a row belongs to one of them by its id alone.

    Attributes:
      index: In [0, count).
      count: At least 1.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads "i/n", i from 0.

        Raises:
          ConfigError: For anything else.
        """
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError(f"`shard` must be i/n with 0 <= i < n, as in 0/4; got {text!r}.")
        return cls(int(index), int(count))

    def path(self, target: Path) -> Path:
        """The shard's own output: out.jsonl -> out-00001-of-00004.jsonl."""
        stem, dot, suffixes = target.name.partition(".")
        return target.with_name(f"{stem}-{self.index:05}-of-{self.count:05}{dot}{suffixes}")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Settings of a batch job.

    Attributes:
      sampling_params: For every row; a row's own go before them.
      system: A system message for rows that have none; makes a prompt a user message.
      chat: A prompt is a user message and goes through the chat template.
      prompt_column: Column with texts; None looks for `prompt` and `text`.
      messages_column: Column with lists of messages; None looks for `messages`.
      ids_column: Column with token ids; None looks for `input_ids`.
      id_column: Column with unique ids; None looks for `custom_id` and `id`, and hashes rows that
        have neither.
      params_column: Column with a row's own sampling parameters.
      format: "jsonl", "parquet" or "text"; None goes by the name of the input.
      limit: Most rows to read.
      overlong: "error", or "truncate" to drop the first tokens of a prompt that leaves no room for
        `max_new_tokens`.
      is_ordered: Write rows in the order of the input, else as they end.
      output_ids: Write token ids, too.
      retry_errors: Compute the error rows of an earlier run again.
      max_errors: Error rows of this run after which the job gives up; None for no limit.
      overwrite: Begin anew where the output exists.
      shard: Compute only this part.
      max_in_flight: Rows under way at once; None is twice the engine's `max_running_requests`.
      sync_s: Longest time a result stays off the disk, in seconds; twelve times as long for
        Parquet, whose parts should be large.
      rows_per_part: Most rows of a Parquet part.
      progress: Show a bar; None shows it on a terminal.

    Raises:
      ConfigError: For a value out of range.
    """

    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    chat: bool = False
    prompt_column: str | None = None
    messages_column: str | None = None
    ids_column: str | None = None
    id_column: str | None = None
    params_column: str = "sampling_params"
    format: str | None = None
    limit: int | None = None
    overlong: str = "error"
    is_ordered: bool = True
    output_ids: bool = False
    retry_errors: bool = False
    max_errors: int | None = None
    overwrite: bool = False
    shard: Shard | None = None
    max_in_flight: int | None = None
    sync_s: float = 5.0
    rows_per_part: int = 10_000
    progress: bool | None = None

    def __post_init__(self) -> None:
        if self.overlong not in ("error", "truncate"):
            raise ConfigError(f"`overlong` must be error or truncate, got {self.overlong!r}.")
        if self.format is not None and self.format not in FORMATS:
            raise ConfigError(f"`format` must be one of {', '.join(FORMATS)}, got {self.format!r}.")
        for name, least in (("limit", 0), ("max_errors", 0), ("max_in_flight", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"`{name}` must be at least {least}, got {value}.")
        if self.rows_per_part < 1:
            raise ConfigError(f"`rows_per_part` must be at least 1, got {self.rows_per_part}.")

    def identity(self) -> dict[str, Any]:
        """What decides a row's result beside the model; a job may not change it half way."""
        names = ("system", "chat", "overlong", "output_ids")
        columns = ("prompt_column", "messages_column", "ids_column", "id_column", "params_column")
        shard = None if self.shard is None else f"{self.shard.index}/{self.shard.count}"
        return {
            **{name: getattr(self, name) for name in (*names, *columns)},
            "shard": shard,
            "sampling_params": dict(self.sampling_params),
        }


@dataclass(kw_only=True)
class Report:
    """What a job did.

    Attributes:
      output: Where results are; None for standard output and dry runs.
      num_rows: Rows of the input that belong to this job.
      num_skipped: Of these, done by an earlier run.
      num_done: Computed by this run.
      num_errors: Error rows written by this run (dry run: found).
      num_errors_before: Error rows left by earlier runs; `retry_errors` computes them again.
      prompt_tokens: Tokens of the prompts of this run.
      completion_tokens: Tokens generated by it.
      max_prompt_tokens: The longest prompt.
      seconds: How long it took, start-up apart.
      is_interrupted: Ctrl-C or SIGTERM ended it; run it again to go on.
    """

    output: str | None = None
    num_rows: int = 0
    num_skipped: int = 0
    num_done: int = 0
    num_errors: int = 0
    num_errors_before: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    max_prompt_tokens: int = 0
    seconds: float = 0.0
    is_interrupted: bool = False
