"""Results as JSON, as a table, and in docs/benchmarks.md.

A result is ``{"benchmark", "small", "machine", "rows": [{...}], "tables": {title: [columns]}, "bars": [{"name",
"value", "bar", "met"}]}``. Rows are figures by name, flat; a table shows its columns of the rows that have them all.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from learner.runs.atomic import atomic_write_text
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rewards.errors import DataError

DEFAULT_FOLDER = Path("runs/bench")
NAMES = ("steps", "choice", "control", "scaling", "overlap", "gpu", "first_minutes")
"""In the order of the page."""
BEGIN, END = "<!-- results: written by python -m learner.bench --write -->", "<!-- end of results -->"


def bar(name: str, value: float, limit: float, *, at_least: bool = True) -> dict[str, Any]:
    """A figure and what it must reach."""
    met = value >= limit if at_least else value <= limit
    return {"name": name, "value": value, "bar": f"{'>=' if at_least else '<='} {limit:.4g}", "met": bool(met)}


def store(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write one benchmark's result; the newest replaces the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['benchmark']}.json"
    atomic_write_text(path, json.dumps(result, indent=1) + "\n")
    return path


def load(folder: Path) -> list[dict[str, Any]]:
    """The stored results, in the order of ``NAMES``; those that were never run are left out."""
    paths = [folder / f"{name}.json" for name in NAMES]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def render(result: Mapping[str, Any]) -> str:
    """Markdown: what it ran on, its tables (one for each set of columns), its bars."""
    machine = result["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    parts = [
        f"### {result['benchmark']}{' (small sizes)' if result['small'] else ''}",
        f"{where}; torch {machine['torch']}, {machine['threads']} thread(s), load average "
        f"{machine['load_average']:.1f} at the start; {machine['when']}, {machine['commit'] or 'no git'}.",
    ]
    for title, columns in result["tables"].items():
        rows = [row for row in result["rows"] if set(columns) <= set(row)]
        parts.append(f"**{title}**\n\n{_table(columns, rows)}")
    if result["bars"]:
        bars = [{**found, "met": "met" if found["met"] else "MISSED"} for found in result["bars"]]
        parts.append(_table(("name", "value", "bar", "met"), bars))
    return "\n\n".join(parts) + "\n"


def write_into(document: Path, text: str) -> None:
    """Replace what is between the two marks.

    Raises:
        DataError: the document has no such marks.
    """
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise DataError(f"{document} has no place for results; put the lines {BEGIN} and {END} into it")
    atomic_write_text(document, f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [list(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def main(name: str, run: Callable[..., dict[str, Any]]) -> int:
    """The command line of one benchmark: run, print, store, and write it down. Returns the exit status."""
    return exit_status(partial(_command, name, run))


def options(name: str) -> Parser:
    """What every benchmark's command line knows."""
    parser = Parser(f"python -m learner.bench.{name}", description="Measure, print, and keep the result.")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder of the JSON results")
    parser.add_argument("--write", type=Path, help="put the result between the marks of this document")
    return parser


def keep(result: Mapping[str, Any], arguments: Namespace) -> None:
    """Store the result, print it, and write it down where ``options`` asked for that."""
    store(arguments.out, result)
    print(render(result))
    if arguments.write is not None:
        write_into(arguments.write, render(result))


def _command(name: str, run: Callable[..., dict[str, Any]]) -> int:
    arguments = options(name).parse_args()
    keep(run(small=arguments.small), arguments)
    return 0
