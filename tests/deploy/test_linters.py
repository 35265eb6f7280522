"""deploy/'s shell scripts through shellcheck and its Dockerfile through hadolint, each with a control."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))
DOCKERFILE = DEPLOY / "Dockerfile"


def linter(name: str) -> str:
    """Path of a program that the dev dependencies bring; skips where they have none for this machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"there is no {name} for this machine")
    return found


def complaints(name: str, path: Path) -> str:
    answer = subprocess.run([linter(name), str(path)], capture_output=True, text=True, timeout=60)
    assert answer.returncode in (0, 1), answer.stderr
    assert bool(answer.stdout) == (answer.returncode == 1)
    return answer.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    assert complaints("shellcheck", script) == ""


def test_shellcheck_finds(tmp_path: Path) -> None:
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/usr/bin/env bash\nfolder=$1\nrm -rf $folder/*\n")
    assert "SC2086" in complaints("shellcheck", bad)


def test_hadolint_has_nothing_to_say() -> None:
    assert complaints("hadolint", DOCKERFILE) == ""


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("RUN cd /opt", "DL3003"),
        ("RUN apt-get install curl", "DL3014"),
        ("ADD pyproject.toml .", "DL3020"),
        ("RUN rm -rf $PLACE", "SC2086"),
    ],
)
def test_hadolint_finds(tmp_path: Path, line: str, rule: str) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text(DOCKERFILE.read_text() + line + "\n")
    assert rule in complaints("hadolint", bad)


# ---- what no linter knows


def copied(text: str) -> list[str]:
    """What the Dockerfile takes from the repository, less the whole of it."""
    lines = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", text, re.MULTILINE)
    return [name for line in lines for name in line.split() if name != "."]


def kept_out(name: str, patterns: list[str]) -> bool:
    """Whether the ignore file keeps it from the build: the last pattern that fits decides, as Docker says."""
    out = False
    for pattern in patterns:
        keep = pattern.startswith("!")
        bare = pattern.lstrip("!")
        if bare in ("*", name) or Path(name).match(bare) or Path(name).is_relative_to(bare):
            out = not keep
    return out


def ignore_patterns() -> list[str]:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_image_takes_files_that_are_there_and_not_ignored() -> None:
    names = copied(DOCKERFILE.read_text())
    assert {"pyproject.toml", "deploy/constraints.txt", "deploy/requirements-cluster.txt"} <= set(names)
    for name in [*names, "learner", "rollout", "rewards", "services"]:
        assert (ROOT / name).exists(), name
        assert not kept_out(name, ignore_patterns()), name
    for name in ("runs", ".git", ".venv", ".env", "id_ed25519", "tests", "deploy/local.sh"):
        assert kept_out(name, ignore_patterns()), name


def unpinned(text: str) -> list[str]:
    """Commands by which pip may install a version that no list names."""
    flat = text.replace("\\\n", " ")
    commands = re.findall(r"(?:^RUN|&&) *((?:PIP\S+=\S+ )*pip install .*?) *(?=&&|$)", flat, re.MULTILINE)
    assert commands
    return [each for each in commands if not re.search(r"--require-hashes|--constraint |PIP_CONSTRAINT=", each)]


def test_the_image_installs_nothing_that_is_not_pinned() -> None:
    text = DOCKERFILE.read_text()
    assert unpinned(text) == []
    assert unpinned(text + "RUN pip install ray\n") == ["pip install ray"]
    cuda = text.partition("AS packages-cuda")[2].partition("FROM ")[0]
    assert all("--require-hashes" in line for line in cuda.splitlines() if "pip install" in line)


def test_the_image_runs_as_an_ordinary_user_and_asks_for_a_token() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["1000"]
    assert "ENV RAY_AUTH_MODE=token" in text
    assert not re.search(r"(?i)^(ENV|ARG).*(TOKEN|SECRET|PASSWORD|KEY)=(?!token)", text, re.MULTILINE)
