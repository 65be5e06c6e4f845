"""`jaxengine serve`: the command line of the server."""

import argparse
import ipaddress
from pathlib import Path
from typing import Any

from jaxengine.errors import ConfigError
from jaxengine.serve.engine_options import add_engine_options, engine_settings

EPILOG = """\
examples:
  jaxengine serve --model Qwen/Qwen2.5-0.5B-Instruct
  jaxengine serve --host 0.0.0.0 --api-key-file key.txt --requests-per-minute 60

  from openai import OpenAI
  client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
"""


def add_serve_command(commands: Any) -> None:
    """Adds `serve` to the command line."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server on this machine",
        usage="jaxengine serve [--model PATH] [OPTION ...]",
        description="Serves /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: %(default)s)")
    parser.add_argument("--name", default="", help="the model's name to clients")
    parser.add_argument(
        "--api-key-file", metavar="PATH", help="file with the key clients must send"
    )
    parser.add_argument(
        "--max-body-bytes",
        type=int,
        default=8 << 20,
        metavar="N",
        help="largest request (default: %(default)s)",
    )
    parser.add_argument(
        "--max-requests",
        type=int,
        default=1024,
        metavar="N",
        help="requests under way at once; more are answered 429 (default: %(default)s)",
    )
    parser.add_argument(
        "--requests-per-minute", type=int, metavar="N", help="of one client (default: any)"
    )
    add_engine_options(parser)
    parser.set_defaults(run=serve_command)


def serve_command(args: argparse.Namespace) -> None:
    """Runs the server until it is stopped.

    Raises:
      ConfigError: Where the extra is not installed, or an open address has no key.
    """
    try:
        import uvicorn

        from jaxengine.serve.server import Limits, make_app
    except ImportError as error:
        raise ConfigError(
            f"The server needs {error.name}; pip install 'jaxengine[serve]'."
        ) from error
    key = _read_key(args.api_key_file)
    if key is None and not _is_loopback(args.host):
        raise ConfigError(
            f"`--host` {args.host} can be reached from other machines; pass `--api-key-file`, or "
            "keep to 127.0.0.1."
        )
    limits = Limits(
        api_key=key,
        max_body_bytes=args.max_body_bytes,
        max_requests=args.max_requests,
        requests_per_minute=args.requests_per_minute,
    )
    import jaxengine

    with jaxengine.Engine(model_path=args.model, **engine_settings(args)) as engine:
        app = make_app(engine, model=args.name, limits=limits)
        uvicorn.run(app, host=args.host, port=args.port, log_level="info")


def _read_key(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        key = Path(path).read_text().strip()
    except OSError as error:
        raise ConfigError(f"`--api-key-file` {path} cannot be read: {error.strerror}.") from error
    if not key:
        raise ConfigError(f"`--api-key-file` {path} is empty; write the key into it.")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
