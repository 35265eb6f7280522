"""What the pages say of the methods is what the code has: docs/methods.md and docs/comparison-sudoku.md."""

import json
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from learner.settings.objective import ObjectiveSection
from learner.settings.objectives import ObjectiveConfig

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, type[ObjectiveSection]] = {
    v.model_fields["type"].default: v for v in typing.get_args(typing.get_args(ObjectiveConfig)[0])
}
SETTING = re.compile(r"([a-z_.]+)=(\S+)")


def settings(text: str) -> dict[str, Any]:
    """Of ``a=1 base.type=x``, as nested dictionaries."""
    found: dict[str, Any] = {}
    for name, value in SETTING.findall(text):
        *path, last = name.split(".")
        section = found
        for part in path:
            section = section.setdefault(part, {})
        section[last] = yaml.safe_load(value)
    return found


def problems(page: str) -> list[str]:
    """What docs/methods.md lacks, or says otherwise than the code."""
    tables, _, rest = page.partition("## Method by method")
    sections = dict(re.findall(r"^### [^\n]*`(\w+)`\n(.*?)(?=^##)", rest, re.DOTALL | re.MULTILINE))
    found = [f"{name}: no such method" for name in sections if name not in VARIANTS]
    for name, variant in VARIANTS.items():
        file = variant.method.partition(":")[0].replace(".", "/") + ".py"
        if not re.search(rf"^\| [^|]*`{name}` \| \[[\d.]+\]\(https://arxiv.org/", tables, re.MULTILINE):
            found.append(f"{name}: no paper")
        if not re.search(rf"^\| `{name}` \| `{file}` \| `tests/[^|]+ \| [^|]+ \| [^|]+ \|$", tables, re.MULTILINE):
            found.append(f"{name}: no file, tests and proof")
        found += [f"{name}: {problem}" for problem in of_section(sections.get(name, ""), variant)]
    return found


def of_section(section: str, variant: type[ObjectiveSection]) -> list[str]:
    found = [] if re.search(r"\A\n    (loss|\w+ += )", section) else ["no equation"]
    defaults = re.search(r"^- Defaults: `([^`]+)`\.", section, re.MULTILINE)
    ours = re.search(r" Ours: (.*)\.$", section, re.MULTILINE)
    official = re.search(r"^- Official code: (.+)\.$", section, re.MULTILINE)
    if not defaults or not official:
        return [*found, "no defaults, or nothing of the official code"]
    stated = settings(defaults[1])
    if stated.keys() != variant.model_fields.keys() - {"type"}:
        found.append(f"these settings are stated: {', '.join(stated)}")
    elif variant.model_validate(stated) != variant():
        found.append("another default")
    marked = set(re.findall(r"`(\w+)`", ours[1])) if ours else set()
    switched = settings(" ".join(re.findall(r"`([^`]+)`", official[1])))
    found += [f"no setting {name}" for name in (marked | switched.keys()) - variant.model_fields.keys()]
    return found if found else [] if variant.model_validate(switched) else ["refused"]


def test_every_method_has_its_paper_file_tests_equation_defaults_and_official_settings() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert problems(page) == []
    for name, wrong in (
        ("agrpo", page.replace("Defaults: `k=4 ", "Defaults: `k=5 ")),
        ("dtm", page.replace("tilt_step=5 tilt_end", "tilt_end")),
        ("spg", re.sub(r"### SPG.*?(?=^## )", "", page, flags=re.DOTALL | re.MULTILINE)),
        ("wd1", page.replace("`softmax_over=batch`.", "`softmax_of=batch`.")),
        ("rspo", page.replace("| `rspo` | `learner/objectives/rspo.py`", "| `rspo` | `learner/objectives/dmpo.py`")),
        ("trafl", re.sub(r"    loss = .*\(s - s_reference.*\n", "", page)),
    ):
        said = problems(wrong)
        assert said and all(problem.startswith(f"{name}: ") for problem in said), "a control"


def at_the_top(comparison: dict[str, Any]) -> set[str]:
    """Methods whose chosen learning rate is the largest that was tried."""
    tried = {name: [cell["point"]["learner.lr"] for cell in of["tuning"]["cells"]] for name, of in comparison.items()}
    return {name for name, of in comparison.items() if of["point"]["learner.lr"] == max(tried[name])}


def test_the_comparison_says_whose_learning_rate_is_at_the_edge_of_its_grid() -> None:
    docs = ROOT / "docs"
    comparison = json.loads((docs / "comparison-sudoku.json").read_text(encoding="utf-8"))["methods"]
    page = (docs / "comparison-sudoku.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert {name for name, *_ in rows} == at_the_top(comparison) != set(comparison)
    for name, *stated in rows:
        cells = sorted(comparison[name]["tuning"]["cells"], key=lambda cell: -cell["point"]["learner.lr"])
        assert stated == [f"{cell['solve_rate']:.3f}" for cell in cells[:2]]
    at_the_bottom = {
        name
        for name, of in comparison.items()
        if of["point"]["learner.lr"] == min(cell["point"]["learner.lr"] for cell in of["tuning"]["cells"])
    }
    assert not at_the_bottom, "the page says that no method chose the lowest"
