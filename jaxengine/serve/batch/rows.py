"""From a record to the request it asks for: its id, its token ids, its parameters, the rest."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from jaxengine.errors import PromptTooLongError, RequestError
from jaxengine.serve import openai_api
from jaxengine.serve.batch.columns import passed_names
from jaxengine.serve.batch.config import BatchConfig
from jaxengine.serve.batch.keys import content_key, shard_of
from jaxengine.serve.batch.read import Record
from jaxengine.serve.messages import chat_ids
from jaxengine.text.tokenizer import encode

TEXTS, IDS = ("prompt", "text"), ("input_ids", "token_ids", "prompt_token_ids")
ID_COLUMNS = ("custom_id", "id")
"""Columns that are looked for where none is named."""

SEEDS = ("seed", "sampling_seed")
DEFAULT_MAX_NEW_TOKENS = 128


def max_tokens(engine: Any) -> int:
    """Longest prompt and output together that an engine takes."""
    return min(engine.config.context_length, engine.stats()["max_total_tokens"])


class Counts(Protocol):
    """Tells repeated ids apart."""

    def count(self, key: str) -> int:
        """How often this key was counted before."""
        ...


class Row(NamedTuple):
    """One row of the job.

    Attributes:
      key: Unique in the job.
      line: From 1, in the input.
      arguments: What `Engine.imap` takes; empty where there is an error.
      error: Why there is no request.
      columns: What is passed through, under the names it gets.
      num_truncated: Prompt tokens that were dropped.
      is_openai: It is one of OpenAI's batch lines, and is answered with one.
      openai: What such a line asks for.
    """

    key: str
    line: int
    arguments: dict[str, Any]
    error: RequestError | None = None
    columns: Mapping[str, Any] = {}
    num_truncated: int = 0
    is_openai: bool = False
    openai: openai_api.Request | None = None


def prompt_columns(config: BatchConfig) -> dict[str, str]:
    """Columns a prompt may stand in, and what they hold: "text", "messages" or "ids"."""
    named = {
        config.prompt_column: "text",
        config.messages_column: "messages",
        config.ids_column: "ids",
    }
    chosen = {column: kind for column, kind in named.items() if column is not None}
    return chosen or {
        "messages": "messages",
        **dict.fromkeys(TEXTS, "text"),
        **dict.fromkeys(IDS, "ids"),
    }


def passed_fields(schema: Any, config: BatchConfig) -> list[Any]:
    """Fields of an Arrow schema that are passed through, under the names they get."""
    ids = [config.id_column] if config.id_column else [c for c in ID_COLUMNS if c in schema.names]
    prompts = [column for column in prompt_columns(config) if column in schema.names]
    # Where several might be meant, each row decides, and passes the others through.
    used = {config.params_column, *(prompts if len(prompts) == 1 else ()), *ids[: len(ids) == 1]}
    names = passed_names(schema.names)
    return [schema.field(old).with_name(new) for old, new in names.items() if old not in used]


class RowReader:
    """Reads records as rows. Knows the tokenizer, not the engine."""

    def __init__(
        self,
        config: BatchConfig,
        tokenizer: Any,
        max_prompt_tokens: int,
        keys: Counts,
        defaults: Mapping[str, Any],
        *,
        is_typed: bool,
    ) -> None:
        """Args:
        config: Where things stand in a record.
        tokenizer: None where rows hold token ids.
        max_prompt_tokens: Longest prompt and output together.
        keys: Counts ids.
        defaults: The job's sampling parameters.
        is_typed: Records come from a table with types.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._max_tokens = max_prompt_tokens
        self._keys = keys
        self._defaults = defaults
        self._is_typed = is_typed

    def read(self, records: Iterator[Record]) -> Iterator[Row]:
        """The rows of this job's shard."""
        shard = self._config.shard
        for record in records:
            base, error = self._id(record)
            if shard is not None and shard_of(base, shard.count) != shard.index:
                continue
            num_before = self._keys.count(base)
            key = f"{base}#{num_before}" if num_before else base
            if error is None and num_before and self._id_column(record.value) is not None:
                error = f"The id {base!r} of line {record.line} was used before; ids are unique."
                key = content_key([base, num_before])  # which nobody else's id is
            row = Row(key, record.line, {})
            if error is not None:
                yield row._replace(error=RequestError(error), columns=self._rest(record.value, ()))
                continue
            yield self._request(row, record.value)

    def _id(self, record: Record) -> tuple[str, str | None]:
        """A row's id before repeats are numbered, and what is wrong with the record."""
        if record.error is not None:
            return content_key(record.raw), record.error
        column = self._id_column(record.value)
        if column is None:
            return content_key(record.value), None
        value = record.value.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            problem = (
                f"`{column}` of line {record.line} must be a text or an integer, got {value!r:.80}."
            )
            return content_key(record.value), problem
        return str(value), None

    def _id_column(self, value: Any) -> str | None:
        if self._config.id_column is not None or not isinstance(value, dict):
            return self._config.id_column
        return next((c for c in ID_COLUMNS if value.get(c) is not None), None)

    def _request(self, row: Row, value: Any) -> Row:
        """The row with its arguments, or with what is wrong with it."""
        record = value if isinstance(value, dict) else {"prompt": value}
        try:
            if openai_api.is_batch_line(record):
                row = row._replace(is_openai=True)
                return self._openai(row, record)
            column, kind = self._prompt_column(record, row.line)
            given = self._params(record, row.line)
            rest = self._rest(record, (column, self._config.params_column))
            row = row._replace(columns=rest)
            ids = self._token_ids(record[column], kind, f"`{column}` of line {row.line}")
            return self._fit(row, ids, given)
        except RequestError as error:
            return row._replace(error=error, arguments={})

    def _openai(self, row: Row, record: Mapping[str, Any]) -> Row:
        request = openai_api.parse(record["url"], record["body"], self._tokenizer)
        row = row._replace(openai=request)
        arguments = dict(request.arguments)
        given = arguments.pop("sampling_params")
        ids = arguments.pop("input_ids", None)
        if ids is None:
            ids = self._text_ids(arguments.pop("prompt"), f"`prompt` of line {row.line}")
        row = self._fit(row, ids, given)
        return row._replace(arguments={**arguments, **row.arguments})

    def _prompt_column(self, record: Mapping[str, Any], line: int) -> tuple[str, str]:
        """The column with the prompt, and what it holds."""
        looked_for = prompt_columns(self._config)
        found = [column for column in looked_for if record.get(column) is not None]
        if not found:
            raise RequestError(
                f"Line {line} has no prompt; looked for {', '.join(f'`{c}`' for c in looked_for)}, "
                f"found {', '.join(f'`{c}`' for c in record) or 'no columns'}."
            )
        # A text beside a prompt may be anything; two columns of the other names are a riddle.
        if len(found) > 1 and found != ["prompt", "text"]:
            raise RequestError(
                f"Line {line} has {' and '.join(f'`{c}`' for c in found)}; name the column that "
                "holds the prompt, or leave one out."
            )
        return found[0], looked_for[found[0]]

    def _token_ids(self, value: Any, kind: str, place: str) -> list[int]:
        value = _from_json(value, place) if kind != "text" else value
        if kind == "ids":
            if not isinstance(value, list) or {*map(type, value)} != {int}:
                raise RequestError(f"{place} must be a list of token ids that is not empty.")
            return value
        if kind == "text" and not isinstance(value, str):
            raise RequestError(f"{place} must be a text, got {type(value).__name__}.")
        if kind == "text" and not value:
            raise RequestError(f"{place} is empty; a prompt needs at least one character.")
        system = self._config.system
        if kind == "text" and system is None and not self._config.chat:
            return self._text_ids(value, place)
        messages = [{"role": "user", "content": value}] if kind == "text" else value
        return chat_ids(self._need_tokenizer(), messages, system=system)

    def _text_ids(self, text: str, place: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"at character {error.start}"
            raise RequestError(f"{place} holds half a surrogate pair {where}.") from None
        return encode(self._need_tokenizer(), [text])[0]

    def _params(self, record: Mapping[str, Any], line: int) -> dict[str, Any]:
        """What the row itself asks for."""
        column = self._config.params_column
        given = record.get(column)
        if given is None:
            return {}
        given = _from_json(given, f"`{column}` of line {line}")
        if not isinstance(given, dict):
            raise RequestError(f"`{column}` of line {line} must be an object, got {given!r:.80}.")
        # A struct of a table has all fields in all rows.
        return {k: v for k, v in given.items() if v is not None} if self._is_typed else given

    def _fit(self, row: Row, ids: list[int], given: Mapping[str, Any]) -> Row:
        """The row's arguments, its prompt cut to what the context has room for."""
        if not ids:
            raise RequestError(f"The prompt of line {row.line} has no tokens.")
        # A seed that the row brings is used as it is; the job's is derived for it.
        is_own = any(given.get(name) is not None for name in SEEDS)
        dropped = SEEDS if is_own else ()
        params = {k: v for k, v in self._defaults.items() if k not in dropped} | {**given}
        num_truncated = 0
        if len(ids) >= self._max_tokens and self._config.overlong == "error":
            raise PromptTooLongError(
                f"The prompt of line {row.line} has {len(ids):,} tokens; at most "
                f"{self._max_tokens - 1:,} fit beside one new one. Shorten it, raise "
                "`context_length`, or have it cut with `overlong` truncate."
            )
        if self._config.overlong == "truncate":
            asked = params.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
            # Whatever is asked for, half of the context stays the prompt's.
            is_count = isinstance(asked, int) and asked > 0
            room = self._max_tokens - min(asked if is_count else 1, self._max_tokens // 2)
            num_truncated = max(0, len(ids) - room)
        arguments = {
            "input_ids": ids[num_truncated:],
            "sampling_params": params,
            "seed_key": 0 if is_own else row.key,
        }
        return row._replace(arguments=arguments, num_truncated=num_truncated)

    def _rest(self, record: Any, used: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(record, dict):
            return {}
        dropped = {*used, self._id_column(record)}
        names = passed_names(record)
        return {names[name]: value for name, value in record.items() if name not in dropped}

    def _need_tokenizer(self) -> Any:
        if self._tokenizer is None:
            raise RequestError("A text needs a tokenizer, and this engine has none; use token ids.")
        return self._tokenizer


def _from_json(value: Any, place: str) -> Any:
    """Columns of tables without nested types hold them as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RequestError(f"{place} is a text that is not JSON: {error}.") from error
