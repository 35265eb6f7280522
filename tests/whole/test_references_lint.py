"""Nothing refers to notes that readers of the repository don't have: a lint over all its texts, and its control."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("services", "learner", "rollout", "rewards", "tests", "docs", "deploy", ".ci", ".github")
TEXTS = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".sh", ".js", ".css", ".html", ".svg", ".txt", ".cfg", ""}

# The folder beside a checkout is named by a variable and found by a fixture; no text gives a path into it.
ELSEWHERE = re.compile(r"\b(DESIGN|official|newer|agrpo_reference|architecture)\.md\b|(?<![\w/.-])(\.\.?/)*shared/")


def references(text: str) -> list[tuple[int, str]]:
    """(line, reference) of each reference to such notes."""
    return [(number, found[0]) for number, line in enumerate(text.split("\n"), 1) for found in ELSEWHERE.finditer(line)]


def texts() -> list[Path]:
    nested = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path for path in [*ROOT.iterdir(), *nested] if path.is_file() and path.suffix in TEXTS]


def test_no_text_refers_to_what_readers_do_not_have() -> None:
    paths = [path for path in texts() if path != Path(__file__).resolve()]
    assert len(paths) > 300
    found = [
        f"{path.relative_to(ROOT)}:{line}: {reference}"
        for path in paths
        for line, reference in references(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert not found, "say it in the repository instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "bad",
    [
        "(DESIGN.md, section 2)",
        "official.md T2: entropies",
        "see newer.md.",
        "from shared/algorithms/agrpo_reference.md",
        "`../shared/golden`",
        "--golden=../../shared/golden",
        "[the design](architecture.md)",
    ],
)
def test_lint_finds(bad: str) -> None:
    assert references(f"first\n{bad}\n")[0][0] == 2


@pytest.mark.parametrize(
    "good",
    [
        "run.dir=/shared/runs",
        "docs/exactness.md",
        "a shared folder",
        "UNMASK_SHARED",
        "tests/shared/x",
        "unofficial.md",
    ],
)
def test_lint_lets_pass(good: str) -> None:
    assert not references(good)
