"""What README, docs and docstrings name is there: files, modules of commands, links. Each lint has its control."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.store.faults import CAUSES, PARTS

ROOT = Path(__file__).resolve().parents[2]
CODE = ("learner", "rollout", "rewards", "services", "tests", "deploy", "docs")
FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(CODE)})/[\w./-]*\.(?:py|md|ya?ml|txt|sh|svg|png)\b")
MODULE = re.compile(r"python3? -m ((?:learner|rollout|rewards|services|tests)(?:\.[a-z]\w*)+)")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def pages() -> list[Path]:
    places = [ROOT, ROOT / "docs", ROOT / "tests" / "golden", ROOT / "tests" / "golden" / "methods"]
    return sorted(path for place in places for path in place.glob("*.md"))


def prose(source: str) -> str:
    """Docstrings and comments of a module."""
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, nodes)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*(text for text in docstrings if text), *comments])


def texts() -> Iterator[tuple[str, str]]:
    """(where, text) of all that is read: pages, docstrings, comments, the Makefile and recipes."""
    for path in [*pages(), ROOT / "Makefile", *(ROOT / "learner" / "recipes").glob("*.yaml")]:
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), prose(path.read_text(encoding="utf-8"))


def absent(text: str) -> list[str]:
    """Files and modules that the text names and that aren't there."""
    files = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    modules = [name for name in MODULE.findall(text) if not module_exists(name)]
    return files + modules


def module_exists(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").exists() or (place / "__main__.py").exists()


def dead_links(page: Path, text: str) -> list[str]:
    """Links of the page to files or headings that aren't there."""
    dead = []
    for name, heading in LINK.findall(text):
        target = page.parent / name if name else page
        known = headings(target) if heading and target.suffix == ".md" and target.exists() else {heading}
        if not target.exists() or heading not in known:
            dead.append(f"{name}#{heading}" if heading else name)
    return dead


def headings(page: Path) -> set[str]:
    """The headings' names as GitHub makes them."""
    lines = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_files_and_modules_that_are_named_are_there() -> None:
    found = {where: names for where, text in texts() if (names := absent(text))}
    assert not found
    assert absent("see learner/rank.py, docs/loop.md\n python -m learner.config and `learner/main.py`") == [
        *("learner/rank.py", "learner.config"),
    ], "the control"


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_a_dead_link_is_found() -> None:
    text = "[a](docs/loop.md) [b](docs/old.md) [c](README.md#use-it) [d](README.md#misuse) [e](#two-commands)"
    assert dead_links(ROOT / "README.md", text) == ["docs/old.md", "README.md#misuse"]


def test_every_page_is_in_the_index() -> None:
    named = {name for name, _ in LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))}
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= named


def test_every_kind_of_fault_is_told() -> None:
    """The table of docs/faults.md has the parts and causes of the code, and no others."""
    table = re.findall(
        r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE
    )
    assert sorted(part for part, _ in table) == sorted(PARTS)
    assert {cause for _, causes in table for cause in re.findall(r"\w+", causes)} == set(CAUSES)


def test_the_recordings_are_those_that_their_pages_list() -> None:
    golden = ROOT / "tests" / "golden"
    for folder, pattern in ((golden, r"^\| (\d\d) \|"), (golden / "methods", r"^\| (\w+/\d\d)_")):
        text = (folder / "README.md").read_text(encoding="utf-8")
        listed = set(re.findall(pattern, text, re.MULTILINE))
        if folder == golden:
            listed |= {"20", "21"}  # the sampler cases are in a sentence
        cases = [path for path in folder.rglob("[0-9][0-9]_*.npz") if folder != golden or path.parent == golden]
        assert {str(path.relative_to(folder)).partition("_")[0] for path in cases} == listed
        assert all(path.with_suffix(".json").exists() for path in cases)
