"""The layout shows itself: every folder of code says in one sentence what it is, and no file is too long to be read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("services", "learner", "rollout", "rewards")
MOST_LINES = 400
VENDORED = {"vendor", "__pycache__"}


def undescribed(package: Path) -> list[str]:
    """Folders of Python files without an ``__init__.py``, or with one that doesn't begin with a sentence."""
    folders = {path.parent for path in package.rglob("*.py")}
    return sorted(str(folder.relative_to(package.parent)) for folder in folders if not begins_with_a_sentence(folder))


def begins_with_a_sentence(folder: Path) -> bool:
    init = folder / "__init__.py"
    text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init.exists() else None
    return text is not None and "." in text.partition("\n\n")[0]


def too_long(package: Path) -> list[str]:
    paths = [path for path in package.rglob("*") if path.suffix in (".py", ".js", ".css", ".html")]
    own = [path for path in paths if not VENDORED & set(path.parts)]
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in own}
    return [f"{path}: {lines} lines" for path, lines in counts.items() if lines > MOST_LINES]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_says_what_it_is(package: str) -> None:
    assert undescribed(ROOT / package) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_product_file_is_too_long(package: str) -> None:
    assert too_long(ROOT / package) == []


def test_the_lints_find(tmp_path: Path) -> None:
    package = tmp_path / "package"
    for name, text in {"said": '"""What it is."""', "empty": "", "bare": "import os", "word": '"""Things"""'}.items():
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text(text)
    (package / "none").mkdir()
    (package / "none" / "code.py").write_text("x = 1\n" * MOST_LINES)
    assert undescribed(package) == ["package/bare", "package/empty", "package/none", "package/word"]
    assert too_long(package) == []
    (package / "none" / "code.py").write_text("x = 1\n" * (MOST_LINES + 1))
    assert too_long(package) == [f"{package / 'none' / 'code.py'}: {MOST_LINES + 1} lines"]
