"""``python -m services.dashboard --runs DIR``: serve the dashboard until Ctrl-C."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from rewards.command import Parser, reported
from services.dashboard.settings import DEFAULT_PORT, TOKEN_VARIABLE, Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when asked to end, 1 when it failed, 2 for wrong settings."""
    return reported(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    settings = Settings(
        runs_dir=arguments.runs.expanduser().absolute(),
        store_url=arguments.store,
        host=arguments.host,
        port=arguments.port,
        ray_address=arguments.ray_address,
        ray_working_dir=arguments.ray_working_dir and arguments.ray_working_dir.expanduser().absolute(),
        token_file=arguments.token_file and arguments.token_file.expanduser().absolute(),
    )
    try:
        from services.dashboard.server import serve  # half a second of imports that --help can do without

        serve(settings, any_port=arguments.any_port, while_stdin=arguments.while_stdin)
    except KeyboardInterrupt:
        pass
    return 0


def _parser() -> Parser:
    parser = Parser(
        "python -m services.dashboard",
        description="Watch and control the runs in a folder. Reading needs no token; controls want the one in the "
        f"token file, or in the environment variable {TOKEN_VARIABLE}.",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="folder of runs (default: runs)")
    parser.add_argument(
        "--store", type=_store, metavar="URL", help="a run store that many runs share, such as postgresql:///unmask"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback need a token")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help=f"0: any free one (default: {DEFAULT_PORT})")
    parser.add_argument("--any-port", action="store_true", help="take a free port when that one is in use")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="default: DIR/.dashboard-token")
    parser.add_argument("--ray-address", type=_http, metavar="URL", help="submit runs here, such as http://head:8265")
    parser.add_argument("--ray-working-dir", type=Path, metavar="DIR", help="checkout that submitted runs take along")
    parser.add_argument("--while-stdin", action="store_true", help="end when standard input ends (a run starts it so)")
    return parser


def _http(text: str) -> str:
    place = urlsplit(text)
    if place.scheme not in ("http", "https") or not place.hostname or place.username:
        raise argparse.ArgumentTypeError(f"{text!r} is not the address of a Ray dashboard: http://HOST:8265")
    return text


def _store(text: str) -> str:
    place = urlsplit(text)
    if place.password is not None or "password=" in place.query:
        raise argparse.ArgumentTypeError(
            "it holds a password, which everybody on this machine sees in the command line; "
            "put it into PGPASSWORD or ~/.pgpass"
        )
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; take a number from 0 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
