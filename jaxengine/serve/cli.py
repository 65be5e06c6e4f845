"""The `jaxengine` command."""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jaxengine
from jaxengine.errors import JaxEngineError
from jaxengine.serve.run_command import add_run_command
from jaxengine.serve.serve_command import add_serve_command

DEMO_PROMPTS = (
    "ROMEO:\nWhat light",
    "JULIET:\nO Romeo,",
    "KING RICHARD III:\nA horse!",
    "First Citizen:\nBefore we proceed",
)
DESCRIPTION = """\
An offline LLM engine in JAX, in one process, on an NVIDIA GPU or a CPU.
"""

EPILOG = """\
for a first look, with no download:
  jaxengine demo
  echo "ROMEO:" | jaxengine run --format text - -

with a model of your own, a folder or a hub id:
  jaxengine run in.jsonl out.jsonl --model Qwen/Qwen2.5-0.5B-Instruct
  jaxengine serve --model Qwen/Qwen2.5-0.5B-Instruct

`jaxengine COMMAND --help` tells more, with examples. In Python: `from jaxengine import Engine`.
"""

DEMO_PARAMS = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 48}


EXIT_USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code, 1 for an error that names its remedy."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    args = parser.parse_args(argv, argparse.Namespace(argv=argv))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return args.run(args) or 0
    except JaxEngineError as error:
        print(f"jaxengine: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"jaxengine: {error}. Mend it and run the command again: a batch job goes on from "
            "where it was.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxengine",
        usage="jaxengine COMMAND ...",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=jaxengine.__version__)
    commands = parser.add_subparsers(
        required=True, title="commands", metavar="COMMAND", prog="jaxengine"
    )
    add_run_command(commands)
    add_serve_command(commands)
    demo = commands.add_parser(
        "demo",
        help="generate text four ways: sync and async, streamed and not",
        description="Runs the four generation modes on real prompts. Without --model it uses the "
        "small model that comes with the package, so it needs no download.",
    )
    demo.add_argument(
        "--model",
        default=jaxengine.DEMO_MODEL,
        metavar="PATH",
        help="checkpoint folder, GGUF file or hub id (default: the embedded demo model)",
    )
    demo.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    demo.set_defaults(run=_demo)
    convert = commands.add_parser(
        "convert",
        help="rewrite a safetensors checkpoint as an Orbax one",
        description="Loads a Hugging Face checkpoint, merges its projections once, and writes an "
        "Orbax checkpoint beside the tokenizer and config files; Engine(model_path=DST) loads it.",
    )
    convert.add_argument("src", help="checkpoint folder or hub id", metavar="SRC")
    convert.add_argument("dst", type=Path, help="new folder", metavar="DST")
    convert.set_defaults(run=_convert)
    return parser


def _demo(args: argparse.Namespace) -> None:
    params = {**DEMO_PARAMS, "seed": args.seed}
    started = time.perf_counter()
    with jaxengine.Engine(model_path=args.model, progress=True) as engine:
        print(f"\nReady in {time.perf_counter() - started:.1f} s.")
        _show_modes(engine, params)
        stats = engine.stats()
        print(
            f"{stats['num_generated_tokens']} tokens in {stats['num_windows']} decode windows of "
            f"{stats['mean_window_steps']:.1f} steps on average."
        )
        programs = stats["programs"]
        print(
            f"{programs['num_compiled']} programs compiled, {programs['num_loaded']} taken from "
            "the executable cache."
        )


def _show_modes(engine: Any, params: dict[str, Any]) -> None:
    _title("Non-streaming synchronous generation")
    for prompt, output in zip(DEMO_PROMPTS, engine.generate(DEMO_PROMPTS, params), strict=True):
        _show(prompt, output["text"])

    _title("Streaming synchronous generation")
    for prompt in DEMO_PROMPTS[:2]:
        print(prompt, end="")
        for chunk in engine.generate(prompt, params, stream=True):
            print(chunk["delta_text"], end="", flush=True)
        print("\n")

    async def run_async() -> None:
        _title("Non-streaming asynchronous generation")
        outputs = await engine.async_generate(DEMO_PROMPTS, params)
        for prompt, output in zip(DEMO_PROMPTS, outputs, strict=True):
            _show(prompt, output["text"])

        _title("Streaming asynchronous generation")
        for prompt in DEMO_PROMPTS[:2]:
            print(prompt, end="")
            async for delta in jaxengine.async_stream_and_merge(engine, prompt, params):
                print(delta, end="", flush=True)
            print("\n")

    asyncio.run(run_async())


def _title(text: str) -> None:
    print(f"\n=== {text} ===\n")


def _show(prompt: str, text: str) -> None:
    print(f"{prompt}{text}\n")


def _convert(args: argparse.Namespace) -> None:
    from jaxengine.build import convert

    convert(args.src, args.dst)
    print(f"Wrote {args.dst}; load it with Engine(model_path={str(args.dst)!r}).")


if __name__ == "__main__":
    sys.exit(main())
