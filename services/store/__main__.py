"""Care of run stores:

    python -m services.store upgrade STORE...
    python -m services.store prune STORE... [--keep-samples N] [--metric-days D] [--run ID]
    python -m services.store copy STORE... URL

STORE is a run directory, a folder of run directories, or a URL (sqlite:////path/store.sqlite, postgresql://...).
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rewards.command import Parser, reported
from rewards.errors import StoreError
from services.store import schema
from services.store.catalog import STORE_NAME
from services.store.copying import copy_runs
from services.store.reader import Reader
from services.store.retention import Retention, prune


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when all went well, 1 when a store refused (every store gets its turn), 2 for wrong arguments."""
    return reported(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    stores = [url for store in options.stores for url in _urls(store)]
    return max([reported(partial(_print_done, options, url)) for url in stores])


def _print_done(options: argparse.Namespace, url: str) -> int:
    print(_do(options, url))
    return 0


def _do(options: argparse.Namespace, url: str) -> str:
    if options.command == "upgrade":
        engine = schema.open_engine(url, create=True)
        engine.dispose()
        return f"{engine.url}: schema version {schema.SCHEMA_VERSION}"
    if options.command == "copy":
        source = schema.open_engine(url, create=False, read_only=True)
        target = schema.open_engine(options.target, create=True)
        try:
            copied, skipped = copy_runs(source, target)
        finally:
            source.dispose()
            target.dispose()
        left = f"; left out, being there already: {', '.join(skipped)}" if skipped else ""
        return f"{source.url}: copied {', '.join(copied) or 'no run'}{left}"
    schema.open_engine(url, create=False).dispose()  # it has to be there, and of this version
    engine = schema.open_engine(url, create=True)  # begins each transaction with the lock, as the run's writer does
    try:
        run_ids = Reader(engine).run_ids()
        if options.run is not None and options.run not in run_ids:
            raise StoreError(f"there is no run {options.run} in {engine.url}")
        retention = Retention(samples=options.keep_samples, metric_days=options.metric_days)
        removed = [prune(engine, run_id, retention) for run_id in run_ids if options.run in (None, run_id)]
    finally:
        engine.dispose()
    samples, metrics = (sum(counts) for counts in zip(*removed, strict=True)) if removed else (0, 0)
    return f"{engine.url}: removed {samples} samples, {metrics} metric rows"


def _urls(store: str) -> list[str]:
    if "://" in store:
        return [store]
    path = Path(store).absolute()
    found = [path / STORE_NAME] if (path / STORE_NAME).is_file() else sorted(path.glob(f"*/{STORE_NAME}"))
    if not found:
        raise StoreError(f"no run store at {path}: expected a folder with {STORE_NAME}, or a folder of such, or a URL")
    return [schema.sqlite_url(each) for each in found]


def _parser() -> Parser:
    parser = Parser("python -m services.store", description="Care of run stores.")
    commands = parser.add_subparsers(dest="command", required=True)
    upgrade = commands.add_parser("upgrade", help="bring stores to this Unmask's schema version")
    pruning = commands.add_parser("prune", help="thin out what is old; a file keeps its size and uses the room again")
    copying = commands.add_parser("copy", help="copy the runs of stores into one store, made when it isn't there")
    for command in (upgrade, pruning, copying):
        command.add_argument("stores", nargs="+", metavar="STORE", help="run directory, folder of them, or URL")
    pruning.add_argument("--keep-samples", type=int, help="newest samples to keep of each run and kind")
    pruning.add_argument("--metric-days", type=float, help="after how many days rows give way to buckets of eight")
    pruning.add_argument("--run", help="only this run")
    copying.add_argument("target", metavar="URL", help="store to copy into")
    return parser


if __name__ == "__main__":
    sys.exit(main())
