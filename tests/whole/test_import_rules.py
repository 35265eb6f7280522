"""The design's import rules hold, and import-linter would see it if they did not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("services", "learner", "rollout", "rewards")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--config", "pyproject.toml"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four packages and the contracts, to break rules in."""
    folder = tmp_path_factory.mktemp("import_rules")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_import_rules_hold() -> None:
    answer = lint_imports(ROOT)
    assert answer.returncode == 0, answer.stdout
    assert " 0 broken" in answer.stdout


# Where a forbidden import is put, the import, and the contract that has to break.
VIOLATIONS = [
    ("rewards/violation.py", "import rollout.seeds", "rewards imports nothing of ours"),
    ("rewards/violation.py", "import torch", "rewards imports nothing of ours"),
    ("rollout/violation.py", "import learner.settings.run", "rollout imports nothing of ours but rewards"),
    ("rollout/violation.py", "import services.store", "rollout imports nothing of ours but rewards"),
    ("learner/violation.py", "import services.violation_target", "learner imports no services but the run store"),
    ("services/store/violation.py", "import fastapi", "the run store imports nothing of ours"),
    ("services/store/violation.py", "import rewards.task", "the run store imports nothing of ours"),
    ("services/store/violation.py", "import rollout.seeds", "the run store imports nothing of ours"),
    (
        "services/dashboard/violation.py",
        "import learner.settings.run",
        "the dashboard reads the run store and nothing else",
    ),
    ("learner/settings/arguments.py", "import torch", "reading a configuration loads neither torch nor Ray"),
    ("learner/objectives/violation.py", "import ray", "objectives are pure"),
    ("rewards/errors.py", "import rewards.task", "no cycles inside a package"),
]


@pytest.mark.parametrize("file, statement, contract", VIOLATIONS)
def test_a_forbidden_import_breaks_its_contract(copy: Path, file: str, statement: str, contract: str) -> None:
    path, before = copy / file, None
    if path.exists():
        before = path.read_text()
    (copy / "services" / "violation_target.py").touch()
    path.write_text(f"{before or ''}\n{statement}\n")
    try:
        answer = lint_imports(copy)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert answer.returncode == 1
    broken = " ".join(answer.stdout.split())  # import-linter wraps long names
    assert contract in broken.partition("Broken contracts")[2], answer.stdout


def test_the_copy_without_a_violation_passes(copy: Path) -> None:
    assert lint_imports(copy).returncode == 0


def test_who_only_reads_stores_does_not_load_the_migrations(tmp_path: Path) -> None:
    """The control: who makes a store does."""
    code = """
import sys
import services.dashboard.app
from services.store.schema import open_engine
print("alembic" in sys.modules)
open_engine(sys.argv[1], create=True).dispose()
print("alembic" in sys.modules)
"""
    command = [sys.executable, "-c", code, f"sqlite:///{tmp_path}/store.sqlite"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert answer.stdout.split() == ["False", "True"], answer.stderr
