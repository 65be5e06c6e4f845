"""Batch jobs over a fake engine: formats, odd rows, keys, settings."""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.errors import ConfigError, JobError
from jaxengine.params import derive_seed
from jaxengine.serve import batch
from jaxengine.serve.batch.keys import Keys
from jaxengine.serve.batch.read import Record, read
from jaxengine.serve.batch.rows import RowReader
from tests.serve.batch_files import SUFFIXES, by_id, read_results, write_lines
from tests.serve.fake_engine import CONTEXT_LENGTH, FakeEngine

ROWS = [{"custom_id": f"r{i}", "prompt": f"the fox {i}", "score": i / 2} for i in range(7)]
PARAMS = {"seed": 5, "temperature": 1.0}


def run(source: Path, target: Path, **job: Any) -> batch.Report:
    engine = job.pop("engine", None) or FakeEngine()
    return batch.run(source, target, engine=engine, **{"sampling_params": PARAMS, **job})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "in.jsonl", ROWS)


@pytest.mark.parametrize("suffix_out", SUFFIXES)
@pytest.mark.parametrize("suffix_in", SUFFIXES)
def test_every_format_gives_the_same_results(tmp_path: Path, suffix_in: str, suffix_out: str):
    source = write_lines(tmp_path / f"in.{suffix_in}", ROWS)
    target = tmp_path / f"out.{suffix_out}"
    report = run(source, target, rows_per_part=3)
    assert (report.num_rows, report.num_done, report.num_errors) == (7, 7, 0)
    assert read_results(target) == [
        {
            "id": row["custom_id"],
            "text": f"{row['prompt']}|{derive_seed(5, row['custom_id'], 0) % 1000}",
            "finish_reason": "length",
            "seed": derive_seed(5, row["custom_id"], 0),
            "usage": {
                "prompt_tokens": len(FakeEngine().tokenizer(row["prompt"])["input_ids"]),
                "completion_tokens": 2,
                "truncated_tokens": 0,
            },
            "score": row["score"],
        }
        for row in ROWS
    ]


def test_plain_text_has_a_prompt_a_line(tmp_path: Path):
    (tmp_path / "in.txt").write_bytes("\ufeffthe fox\r\nnaïve café\nthe fox".encode())
    run(tmp_path / "in.txt", tmp_path / "out.jsonl")
    first, second, third = read_results(tmp_path / "out.jsonl")
    assert [row["text"].split("|")[0] for row in (first, second, third)] == [
        "the fox",
        "naïve café",
        "the fox",
    ]
    # The same prompt again is another row, with another sample.
    assert third["id"] == f"{first['id']}#1"
    assert third["seed"] != first["seed"]


def test_pipes_take_and_give_lines(monkeypatch: pytest.MonkeyPatch, source: Path):
    taken = io.BytesIO()
    with source.open("rb") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=taken))
        report = batch.run("-", "-", engine=FakeEngine(), sampling_params=PARAMS)
    assert report.output is None
    assert [json.loads(line)["id"] for line in taken.getvalue().splitlines()] == [
        row["custom_id"] for row in ROWS
    ]


def test_messages_ids_and_system_prompts(tmp_path: Path):
    tokenizer = FakeEngine().tokenizer
    ids = tokenizer("the fox")["input_ids"]
    turns = [{"role": "user", "content": "who?"}]
    rows = [
        {"id": "a", "messages": turns},
        {"id": "b", "messages": [{"role": "system", "content": "mine"}, *turns]},
        {"id": "c", "input_ids": ids},
        {"id": "d", "prompt": "plain"},
        {"id": "e", "messages": json.dumps(turns)},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out.jsonl")
    texts = {row["id"]: row["text"].split("|")[0] for row in read_results(tmp_path / "out.jsonl")}
    asked = "<user>who?<assistant>"
    assert texts == {
        "a": asked,
        "b": f"<system>mine{asked}",
        "c": "the fox",
        "d": "plain",
        "e": asked,
    }
    run(source, tmp_path / "chat.jsonl", system="Be brief.")
    texts = {row["id"]: row["text"].split("|")[0] for row in read_results(tmp_path / "chat.jsonl")}
    assert texts["a"] == f"<system>Be brief.{asked}"
    assert texts["b"] == f"<system>mine{asked}"
    assert texts["d"] == "<system>Be brief.<user>plain<assistant>"


def test_rows_bring_their_own_parameters_and_columns_pass_through(tmp_path: Path):
    rows = [
        {"id": 1, "prompt": "a", "sampling_params": {"n": 2}, "text": "mine", "input_text": "too"},
        {"id": 2, "prompt": "a", "sampling_params": {"seed": 9}, "usage": [1, {"x": "\ud800"}]},
    ]
    source = write_lines(tmp_path / "in.jsonl", rows)
    run(source, tmp_path / "out.jsonl", output_ids=True)
    pair, own = read_results(tmp_path / "out.jsonl")
    assert pair["seeds"] == [derive_seed(5, "1", sample) for sample in range(2)]
    assert [len(pair[name]) for name in ("texts", "finish_reasons", "output_ids")] == [2, 2, 2]
    assert not {"text", "seed", "finish_reason"} & pair.keys()
    assert pair["usage"]["completion_tokens"] == 4
    assert (pair["input_text"], pair["input_input_text"]) == ("mine", "too")
    assert own["seed"] == 9
    assert own["input_usage"] == [1, {"x": "\ud800"}]


ODD = [
    (b'{"custom_id": "fine", "prompt": "the fox"}', None),
    (b'{"custom_id": "torn", "prompt": ', "is not JSON"),
    (b"", "is blank"),
    (b"[1, 2]", "must be a JSON object, got list"),
    (b'{"prompt": "\xff"}', "is not UTF-8"),
    ("{}".encode("utf-16"), "is UTF-16"),
    (b'{"custom_id": "fine", "prompt": "again"}', "was used before"),
    (b'{"custom_id": [1], "prompt": "a"}', "must be a text or an integer"),
    (b'{"custom_id": "none", "question": "a"}', "has no prompt; looked for"),
    (b'{"custom_id": "both", "prompt": "a", "messages": []}', "name the column"),
    (b'{"custom_id": "empty", "prompt": ""}', "is empty"),
    (b'{"custom_id": "half", "prompt": "\\ud800"}', "half a surrogate pair"),
    (b'{"custom_id": "hot", "prompt": "a", "sampling_params": {"temperature": 99}}', "`temper"),
    (b'{"custom_id": "p", "prompt": "a", "sampling_params": [1]}', "must be an object"),
    (b'{"custom_id": "long", "prompt": "' + b"x" * 90 + b'"}', "at most 63 fit"),
    (b'{"custom_id": "m", "messages": [{"role": "user", "content": 3}]}', "must be a text"),
    (b'{"custom_id": "last", "prompt": "the fox"}', None),
    (b"", None),
    (b"  ", None),
]


def test_a_bad_row_is_an_error_row_and_nothing_else(tmp_path: Path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _ in ODD))
    report = run(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    results = read_results(tmp_path / "out.jsonl")
    # Blank lines at the end of a file are no rows.
    expected = ODD[:-2]
    assert (report.num_rows, report.num_errors) == (len(expected), len(expected) - 2)
    for number, ((_, message), row) in enumerate(zip(expected, results, strict=True), start=1):
        if message is None:
            assert "error" not in row
        else:
            assert message in row["error"]["message"]
            assert row["error"]["line"] == number
            assert "text" not in row
    # All is kept: run again, it does nothing.
    assert run(tmp_path / "in.jsonl", tmp_path / "out.jsonl").num_done == 0


def test_an_overlong_prompt_may_lose_its_beginning(tmp_path: Path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a" * 90 + "the end"}])
    params = {**PARAMS, "max_new_tokens": 10}
    run(source, tmp_path / "out.jsonl", overlong="truncate", sampling_params=params)
    [row] = read_results(tmp_path / "out.jsonl")
    assert row["usage"]["prompt_tokens"] == CONTEXT_LENGTH - 10
    assert row["usage"]["truncated_tokens"] > 0
    assert row["text"].split("|")[0].endswith("the end")


def test_an_input_that_breaks_off_keeps_what_was_done(tmp_path: Path, source: Path):
    packed = write_lines(tmp_path / "in.jsonl.gz", ROWS * 1000).read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ConfigError, match="breaks off after line"):
        run(tmp_path / "in.jsonl.gz", tmp_path / "out.jsonl", limit=10**6)
    assert len(read_results(tmp_path / "out.jsonl")) > 100


def test_shards_and_order_change_no_sample(tmp_path: Path, source: Path):
    run(source, tmp_path / "whole.jsonl")
    whole = by_id(tmp_path / "whole.jsonl")
    parts: dict[str, Any] = {}
    for i in range(3):
        report = run(source, tmp_path / "out.jsonl", shard=batch.Shard(i, 3))
        assert report.output == str(tmp_path / f"out-0000{i}-of-00003.jsonl")
        part = by_id(tmp_path / f"out-0000{i}-of-00003.jsonl")
        assert len(part) == report.num_rows
        assert not part.keys() & parts.keys()
        parts |= part
    assert parts == whole
    shuffled = write_lines(tmp_path / "shuffled.jsonl", ROWS[::-1])
    run(shuffled, tmp_path / "out.jsonl", is_ordered=False)
    assert by_id(tmp_path / "out.jsonl") == whole


def test_parquet_keeps_the_types_of_its_columns(tmp_path: Path):
    source = write_lines(tmp_path / "in.parquet", [{**row, "tags": ["x"]} for row in ROWS])
    run(source, tmp_path / "out.parquet", rows_per_part=2)
    files = sorted(path.name for path in (tmp_path / "out.parquet").iterdir())
    parts = [f"part-0000{i}.parquet" for i in range(4)]
    assert files == ["_job.json", "_manifest.json", *parts]
    schema = pyarrow.parquet.read_schema(tmp_path / "out.parquet" / parts[-1])
    assert schema.field("score").type == pa.float64()
    assert pa.types.is_list(schema.field("tags").type)
    assert not {"prompt", "custom_id", "input"} & set(schema.names)
    # A job's output is another's input.
    assert [record.value["id"] for record in read(str(tmp_path / "out.parquet"), "parquet")] == [
        row["custom_id"] for row in ROWS
    ]


def test_openai_batch_lines_are_answered_in_kind(tmp_path: Path):
    def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
        body = {"model": "m", "max_tokens": 4, **body}
        return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}

    turns = [{"role": "user", "content": "who?"}]
    rows = [
        line("chat", "/v1/chat/completions", messages=turns, temperature=0.5, seed=3),
        line("text", "/v1/completions", prompt="the fox", n=2),
        line("bad", "/v1/completions", prompt="the fox", tools=[{"type": "function"}]),
        line("odd", "/v1/completions", prompt="the fox", stream_options=[1]),
        line("half", "/v1/completions", prompt="\ud800"),
        line("where", "/v1/embeddings", input="the fox"),
    ]
    run(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    chat, text, bad, odd, half, where = read_results(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in (chat, text, bad, where)] == [
        "chat",
        "text",
        "bad",
        "where",
    ]
    assert chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert body["object"] == "chat.completion"
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "<user>who?<assistant>|3", "refusal": None}
    assert [choice["index"] for choice in text["response"]["body"]["choices"]] == [0, 1]
    assert "`tools` is not supported" in bad["error"]["message"]
    assert "`stream_options` must be an object" in odd["error"]["message"]
    assert "half a surrogate pair" in half["error"]["message"]
    assert "`url` must be" in where["error"]["message"]
    for target in ("out.jsonl", "out.parquet"):
        run(tmp_path / "in.jsonl", tmp_path / target)
        assert run(tmp_path / "in.jsonl", tmp_path / target).num_done == 0
    nested = by_id(tmp_path / "out.parquet")["chat"]
    assert nested["response"]["body"]["choices"] == body["choices"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
NAMES = "custom_id id prompt text messages input_ids sampling_params body url method".split()
OWN = {
    "role": st.sampled_from(["user", "system", 3]),
    "content": JSON,
    "prompt": JSON,
    "messages": JSON,
    "stop": JSON,
    "n": JSON,
    "max_tokens": JSON,
}
VALUES = (
    JSON
    | st.sampled_from(["/v1/completions", "/v1/chat/completions", "the fox"])
    | st.fixed_dictionaries({}, optional=OWN)
    | st.lists(st.fixed_dictionaries({}, optional=OWN), max_size=2)
)


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_whatever_a_row_holds_it_becomes_a_row(values: list[dict[str, Any]]):
    with contextlib.closing(Keys()) as keys:
        config = batch.BatchConfig(system="Be brief.", overlong="truncate")
        reader = RowReader(config, FakeEngine().tokenizer, 64, keys, PARAMS, is_typed=False)
        rows = list(reader.read(Record(i, value) for i, value in enumerate(values)))
    assert len({row.key for row in rows}) == len(values)
    assert all(bool(row.arguments) != (row.error is not None) for row in rows)


def test_an_id_that_is_used_twice_hides_no_other(tmp_path: Path):
    rows = [{"id": name, "prompt": "a"} for name in ("a", "a", "a#1", "a")]
    run(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    found = by_id(tmp_path / "out.jsonl")
    assert len(found) == 4
    assert [name for name, row in found.items() if "error" not in row] == ["a", "a#1"]


def test_too_many_errors_end_the_job_but_not_its_work(tmp_path: Path):
    rows = [{"id": i, "prompt": "a" if i % 2 else ""} for i in range(20)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    with pytest.raises(JobError, match="3 rows failed and `max_errors` is 2"):
        run(source, tmp_path / "out.jsonl", max_errors=2)
    assert len(read_results(tmp_path / "out.jsonl")) == 5
    report = run(source, tmp_path / "out.jsonl")
    assert (report.num_skipped, report.num_done) == (5, 15)


def test_limit_reads_the_first_rows(tmp_path: Path, source: Path):
    assert run(source, tmp_path / "out.jsonl", limit=3).num_rows == 3
    assert run(source, tmp_path / "out.jsonl", limit=5).num_done == 2


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"overlong": "cut"}, "`overlong` must be error or truncate"),
        ({"format": "csv"}, "`format` must be one of"),
        ({"limit": -1}, "`limit` must be at least 0"),
        ({"rows_per_part": 0}, "`rows_per_part` must be at least 1"),
    ],
)
def test_bad_settings_are_named(bad: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        batch.BatchConfig(**bad)


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "1/0"])
def test_bad_shards_are_refused(text: str):
    with pytest.raises(ConfigError, match="must be i/n"):
        batch.Shard.parse(text)


def test_inputs_that_are_not_there_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="does not exist"):
        run(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="cannot be read"):
        run(tmp_path / "in.parquet", tmp_path / "out.jsonl")
