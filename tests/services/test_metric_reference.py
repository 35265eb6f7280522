"""The table of metrics has every name that the code writes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from rollout.ledger import EVENTS
from services.dashboard.metric_reference import METRICS, describe

ROOT = Path(__file__).parents[2]
WHOLE = (
    *sorted((ROOT / "learner" / "objectives").glob("*.py")),
    *(ROOT / "learner" / "ranks" / f"{name}.py" for name in ("plan", "trajectories")),
)
"""Modules whose dictionaries of names are figures, but for these:"""
NOT_FIGURES = {"elbo", "eubo", "mixture", "zero"}
FUNCTIONS = {
    "learner/control/controller.py": ("_iterate", "_metrics", "_evaluate", "unupdated_metrics"),
    "learner/control/update_metrics.py": ("update_metrics",),
    "learner/finetuning/run.py": ("_iterate",),
    "learner/finetuning/rank.py": ("_loss", "held_out", "_renamed"),
    "learner/reporting/reporter.py": ("iteration",),
    "learner/reporting/workers.py": ("gpu_peaks",),
}
STAGES = {"rollout_wait", "update", "publish"}
"""Keys in ``Controller._iterate`` that become time/..._s."""


def text(node: ast.expr | None) -> str | None:
    """A string, with {} for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def written(tree: ast.AST) -> Iterator[str]:
    """Names in dictionaries, item assignments, and the arguments that name figures."""
    for node in ast.walk(tree):
        found: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            found += node.keys
        elif isinstance(node, ast.DictComp):
            found.append(node.key)
        elif isinstance(node, ast.Assign):
            found += [target.slice for target in node.targets if isinstance(target, ast.Subscript)]
        elif isinstance(node, ast.Call):
            found += [keyword.value for keyword in node.keywords if keyword.arg == "count"]
        yield from (name for name in map(text, found) if name and not name.startswith("{}"))


def of_the_code() -> set[str]:
    names = {name for path in WHOLE for name in written(ast.parse(path.read_text()))} - NOT_FIGURES
    for path, functions in FUNCTIONS.items():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                names |= set(written(node))
    names = {f"time/{name}_s" if name in STAGES else name for name in names}
    names |= {f"machine/ledger_{event}" for event in EVENTS}
    return names


def is_described(name: str) -> bool:
    """Of a name with parts that are filled in: as a family, or by some of its members."""
    members = re.escape(name).replace(r"\{\}", ".+")
    return describe(name) is not None or any(re.fullmatch(members, metric.name) for metric in METRICS)


def test_every_metric_that_the_code_writes_is_described() -> None:
    names = of_the_code()
    assert {"reward/mean", "importance_weight/max", "eval/{}/solve_rate", "machine/failed_reports"} <= names
    assert len(names) > 70
    assert [name for name in sorted(names) if not is_described(name)] == []


def test_a_name_that_the_table_lacks_is_seen() -> None:
    """Control of the test above."""
    (name,) = written(ast.parse('Statistics(means={"a_new/figure": (1.0, 1.0)})'))
    assert not is_described(name)


def test_what_the_table_describes_is_written_somewhere() -> None:
    """Otherwise entries would stay when a metric goes. Prefixed names are put together where they are written."""
    sources = "\n".join(path.read_text() for path in (ROOT / "learner").rglob("*.py"))
    for metric in METRICS:
        last = re.sub(r"\{[^}]*\}.*", "", metric.name).rpartition("/")[2].removesuffix("_s")
        last = re.sub(r"^(ledger|position|fill)_", "", last)
        assert last in sources or last in EVENTS, metric.name


def test_entries_are_sentences_and_patterns_are_whole() -> None:
    for metric in METRICS:
        for sentence in (metric.what, metric.healthy, metric.act):
            assert not sentence or (sentence[0].isupper() or sentence[0].isdigit()) and sentence[-1] == ".", metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    found = describe("eval/m/2/solve_rate")
    assert found is not None and found.name == "eval/{steps}/solve_rate"
    mean = describe("reward/mean")
    assert mean is not None and mean.name == "reward/mean"
    assert describe("my_own/metric") is None and describe("xloss") is None
