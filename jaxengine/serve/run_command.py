"""`jaxengine run`: the command line of a batch job."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from jaxengine.errors import ConfigError
from jaxengine.serve.engine_options import add_engine_options, engine_settings, from_json_or_text

EXIT_OK, EXIT_PARTIAL, EXIT_INTERRUPTED = 0, 3, 130

EPILOG = """\
examples:
  jaxengine run in.jsonl out.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --max-new-tokens 256
  jaxengine run questions.txt out.parquet --system 'Answer in one word.' --temperature 0
  zcat in.jsonl.gz | jaxengine run - out.jsonl.zst --model ... --as-completed
  jaxengine run in.parquet out.parquet --model ... --gpus 8
  jaxengine run in.jsonl - --model ... --dry-run

exit codes:
  0    every row has its result
  1    the job could not begin or had to stop; the message says why, and what to do
  2    wrong usage
  3    the job ended, with error rows in its output
  130  interrupted; run it again to go on

What rows may hold and what results look like: python -c 'help("jaxengine.serve.batch")'
"""

SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 takes the most likely token"),
    "top_p": (float, "keep the likeliest tokens that reach this probability together"),
    "top_k": (int, "keep the K likeliest tokens"),
    "min_p": (float, "drop tokens less likely than X times the likeliest one"),
    "max_new_tokens": (int, "most tokens of a continuation (default: 128)"),
    "n": (int, "samples of each prompt (default: 1)"),
    "seed": (int, "makes the job repeatable (default: a fresh one, kept by the job)"),
}


def add_run_command(commands: Any) -> None:
    """Adds `run` to the command line."""
    parser = commands.add_parser(
        "run",
        help="continue every prompt of a file: JSONL, Parquet, text; resumable",
        usage="jaxengine run IN OUT [--model PATH] [OPTION ...]",
        description="Continues every prompt of IN and writes a row each to OUT. A job that was "
        "interrupted, killed or ran out of disk goes on when the same command is run again.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="JSON lines, Parquet, plain text or OpenAI's batch lines, also .gz or .zst; a folder "
        "of Parquet parts; - is stdin",
    )
    parser.add_argument(
        "target",
        metavar="OUT",
        help=".jsonl, .jsonl.gz, .jsonl.zst, or .parquet (a folder of parts); - is stdout",
    )
    _add_input_options(parser.add_argument_group("input"))
    _add_sampling_options(parser.add_argument_group("sampling, where a row does not say"))
    _add_job_options(parser.add_argument_group("job"))
    add_engine_options(parser)
    parser.set_defaults(run=run_command)


def _add_input_options(group: Any) -> None:
    group.add_argument(
        "--format", choices=("jsonl", "parquet", "text"), help="of IN (default: by its name)"
    )
    for name, what in (
        ("prompt", "texts (default: prompt or text)"),
        ("messages", "chat messages (default: messages)"),
        ("ids", "token ids (default: input_ids)"),
        ("id", "unique ids (default: custom_id or id, else a hash of the row)"),
        ("params", "a row's own sampling parameters (default: sampling_params)"),
    ):
        group.add_argument(f"--{name}-column", metavar="NAME", help=f"column with {what}")
    group.add_argument("--system", metavar="TEXT", help="system message; makes prompts chats")
    group.add_argument("--chat", action="store_true", help="prompts are user messages")
    group.add_argument("--limit", type=int, metavar="N", help="read at most N rows")
    group.add_argument(
        "--overlong",
        choices=("error", "truncate"),
        default="error",
        help="what becomes of a prompt too long for the context: an error row (the default), or it "
        "loses its first tokens",
    )


def _add_sampling_options(group: Any) -> None:
    for name, (kind, what) in SAMPLING.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=kind, metavar="N" if kind is int else "X", help=what)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the continuation; may be repeated"
    )
    group.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other sampling parameter, its value in JSON; may be repeated",
    )


def _add_job_options(group: Any) -> None:
    group.add_argument(
        "--dry-run", action="store_true", help="check rows, count tokens; no engine, no OUT"
    )
    group.add_argument("--as-completed", action="store_true", help="write rows as they end")
    group.add_argument("--output-ids", action="store_true", help="write token ids, too")
    group.add_argument(
        "--max-errors", type=int, metavar="N", help="stop when more than N rows failed"
    )
    group.add_argument("--retry-errors", action="store_true", help="compute error rows again")
    group.add_argument("--overwrite", action="store_true", help="begin anew where OUT exists")
    group.add_argument(
        "--max-in-flight", type=int, metavar="N", help="rows under way at once (default: enough)"
    )
    group.add_argument("--shard", metavar="i/n", help="only this part, into OUT-i-of-n")
    group.add_argument("--gpus", type=int, metavar="N", help="one process and shard for each GPU")
    group.add_argument("--json", action="store_true", help="report in JSON, on standard error")
    group.add_argument("--no-progress", action="store_true", help="no bar")


def run_command(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    from jaxengine.serve import batch

    if args.gpus is not None:
        from jaxengine.serve.gpus import run_on_gpus

        return run_on_gpus(args.gpus, args.argv, has_shard=args.shard is not None)
    config = batch_config(args)
    if args.dry_run:
        report = batch.dry_run(
            args.source, model_path=args.model, engine_settings=engine_settings(args), config=config
        )
    else:
        report = batch.run(
            args.source,
            args.target,
            model_path=args.model,
            engine_settings=engine_settings(args),
            config=config,
        )
    print(
        json.dumps(dataclasses.asdict(report)) if args.json else _in_words(report), file=sys.stderr
    )
    if report.is_interrupted:
        return EXIT_INTERRUPTED
    return EXIT_PARTIAL if report.num_errors + report.num_errors_before else EXIT_OK


def batch_config(args: argparse.Namespace) -> Any:
    """The job's settings."""
    from jaxengine.serve import batch

    params = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.stop:
        params["stop"] = args.stop
    for assignment in args.param:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"`--param` takes NAME=VALUE, got {assignment!r}.")
        params[name] = from_json_or_text(value)
    same = ("system", "chat", "format", "limit", "overlong", "output_ids", "max_errors")
    same += ("retry_errors", "overwrite", "max_in_flight", "prompt_column", "messages_column")
    same += ("ids_column", "id_column")
    settings = {name: getattr(args, name) for name in same}
    if args.params_column is not None:
        settings["params_column"] = args.params_column
    return batch.BatchConfig(
        **settings,
        sampling_params=params,
        is_ordered=not args.as_completed,
        shard=None if args.shard is None else batch.Shard.parse(args.shard),
        progress=False if args.no_progress else None,
    )


def _in_words(report: Any) -> str:
    words = [f"{report.num_rows:,} rows"]
    if report.num_skipped:
        words.append(f"{report.num_skipped:,} done before")
    if num_errors := report.num_errors + report.num_errors_before:
        what = "error row" if num_errors == 1 else "error rows"
        hint = " (--retry-errors computes them again)" if report.output else ""
        words.append(f"{num_errors:,} {what}{hint}")
    words.append(f"{report.prompt_tokens:,} prompt tokens (longest {report.max_prompt_tokens:,})")
    if report.completion_tokens:
        speed = report.completion_tokens / max(report.seconds, 1e-9)
        words.append(f"{report.completion_tokens:,} tokens generated, {speed:,.0f} a second")
    end = "; interrupted: run it again to go on" if report.is_interrupted else ""
    where = f" -> {report.output}" if report.output else ""
    return f"{', '.join(words)}{where}{end}."
