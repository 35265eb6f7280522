"""What gets installed is what was tested: pins, hashes, one index per package, and the audit of the pins."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HASHED = ("requirements-build.txt", "requirements-cluster.txt")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> list[Requirement]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(text) for group in groups for text in group]


def read_list(text: str) -> dict[str, tuple[SpecifierSet, list[str]]]:
    """The pin and the hashes of each package of one of deploy/'s lists."""
    lines = [line for line in text.replace("\\\n", "").splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        pin, *hashes = line.split(" --hash=")
        requirement = Requirement(pin)
        assert re.fullmatch(r"==[^*]+", str(requirement.specifier)) and requirement.marker is None, line
        found[normalised(requirement.name)] = requirement.specifier, [text.strip() for text in hashes]
    return found


def pins() -> dict[str, SpecifierSet]:
    return {name: pin for name, (pin, _) in read_list((DEPLOY / "constraints.txt").read_text()).items()}


# ---- the pins


def installed_for(requirements: list[Requirement]) -> dict[str, str]:
    """Name and version of every distribution that pip installs for ``requirements``, as this environment has them."""
    found: dict[str, str] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    todo = list(requirements)
    while todo:
        requirement = todo.pop()
        key = (normalised(requirement.name), frozenset(requirement.extras))
        if key in visited:
            continue
        visited.add(key)
        distribution = importlib.metadata.distribution(requirement.name)
        found[key[0]] = distribution.version
        for needed in map(Requirement, distribution.requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in requirement.extras | {""}):
                todo.append(needed)
    found.pop("unmask-rl", None)
    return found


def not_pinned(installed: dict[str, str], pinned: dict[str, SpecifierSet]) -> list[str]:
    """torch's build for the CPU, 2.13.0+cpu, counts as its version 2.13.0."""
    return [f"{n}=={v}" for n, v in installed.items() if n not in pinned or not pinned[n].contains(v, prereleases=True)]


def test_everything_that_setup_installs_is_pinned_at_the_version_that_is_installed() -> None:
    installed = installed_for(declared("dev"))
    assert not_pinned(installed, pins()) == []
    # The control: a package that another one asked for, and one with another version.
    assert {"starlette", "h11"} <= installed.keys() and "starlette" not in {normalised(r.name) for r in declared()}
    assert not_pinned(installed, {n: pin for n, pin in pins().items() if n != "h11"}) == [f"h11=={installed['h11']}"]
    assert not_pinned(installed, pins() | {"numpy": SpecifierSet("==1.0")}) == [f"numpy=={installed['numpy']}"]


def test_pins_are_within_the_declared_ranges() -> None:
    pinned = pins()
    for requirement in declared("dev", "postgresql", "quantization", "tensorboard", "cluster"):
        name = normalised(requirement.name)
        if name != "unmask-rl":
            ((version),) = (str(s.version) for s in pinned[name])
            assert requirement.specifier.contains(version), name


# ---- the cluster


def test_the_clusters_lists_have_a_hash_and_the_common_version_for_every_package() -> None:
    pinned = pins()
    for file in HASHED:
        for name, (pin, hashes) in read_list((DEPLOY / file).read_text()).items():
            assert pin == pinned[name], name
            assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes), name


def test_the_clusters_list_is_complete() -> None:
    listed = read_list((DEPLOY / "requirements-cluster.txt").read_text()).keys()
    assert {normalised(r.name) for r in declared("cluster")} <= listed
    assert installed_for(declared()).keys() <= listed
    # What torch's CUDA build asks for is not installed on every machine that runs this test.
    assert {"triton", "cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= listed


def unverified(cluster: dict[str, Any]) -> list[str]:
    """Commands of the nodes by which pip may install a file that none of the lists names by its hash."""
    lines = [line for key in cluster if key.endswith("setup_commands") for line in cluster[key]]
    allowed = [["install", "--require-hashes", "-r", "~/unmask/deploy/requirements-build.txt"]]
    allowed += [
        ["install", "--require-hashes", "--no-build-isolation", "-r", "~/unmask/deploy/requirements-cluster.txt"],
        ["install", "--no-deps", "--no-build-isolation", "~/unmask"],
    ]
    return [line for line in lines if re.search(r"\bpip\b", line) and shlex.split(line)[1:] not in allowed]


def test_the_nodes_install_nothing_without_its_hash() -> None:
    cluster = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    assert unverified(cluster) == []
    assert sum("--require-hashes" in line for line in cluster["setup_commands"]) == len(HASHED)
    loose = "~/unmask-env/bin/pip install 'boto3>=1.34'"
    assert unverified(cluster | {"head_setup_commands": [loose]}) == [loose]


def test_pip_refuses_another_file_of_a_pinned_version(tmp_path: Path) -> None:
    (version,) = (s.version for s in pins()["setuptools"])
    forged = tmp_path / "index" / f"setuptools-{version}-py3-none-any.whl"
    forged.parent.mkdir()
    with zipfile.ZipFile(forged, "w") as wheel:
        information = f"setuptools-{version}.dist-info"
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: setuptools\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")

    def download(*what: str) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-index", "--find-links", str(forged.parent)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        clean |= {"PIP_CONFIG_FILE": os.devnull}
        command = [*pip, "--dest", str(tmp_path), *what]
        return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60)

    refused = download("--require-hashes", "-r", str(DEPLOY / "requirements-build.txt"))
    assert refused.returncode == 1 and "DO NOT MATCH THE HASHES" in refused.stderr
    assert download(f"setuptools=={version}").returncode == 0  # the control: a pin alone lets it in


# ---- make setup


def setup_commands(*variables: str) -> list[list[str]]:
    """pip's commands of `make setup`."""
    make = ["make", "--dry-run", "--always-make", "setup", *variables]
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "TORCH_INDEX")}
    printed = subprocess.run(make, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60, check=True).stdout
    return [shlex.split(line) for line in printed.replace("\\\n", "").splitlines() if " pip install " in line]


def test_only_torch_comes_from_torchs_index() -> None:
    index = "https://torch.example/whl/cpu"
    torch, rest = setup_commands(f"TORCH_INDEX={index}")
    assert torch[torch.index("--index-url") + 1] == index
    assert torch[-3:] == ["--constraint", "deploy/constraints.txt", "torch"] and "--no-deps" in torch
    assert [rest] == setup_commands()
    assert not [word for word in rest if "index" in word]
    assert rest[:2] == [f"PIP_{kind}CONSTRAINT=deploy/constraints.txt" for kind in ("", "BUILD_")]


# ---- the audit


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", DEPLOY / "audit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., str]:
    def store(*affected: dict[str, Any], **record: Any) -> str:
        """An unpacked export with one record."""
        record = {"id": "GHSA-1", "modified": "2026-01-01T00:00:00Z", "affected": affected} | record
        (tmp_path / "GHSA-1.json").write_text(json.dumps(record))
        return str(tmp_path)

    return store


def affects(*events: dict[str, str], name: str = "Jinja2", versions: tuple[str, ...] = (), **package: str) -> Any:
    ranges = [{"type": "ECOSYSTEM", "events": events}] if events else []
    return {"package": {"ecosystem": "PyPI", "name": name} | package, "ranges": ranges, "versions": versions}


(JINJA2,) = (s.version for s in pins()["jinja2"])


@pytest.mark.parametrize(
    "affected, status",
    [
        (affects({"introduced": "0"}), 1),
        (affects({"introduced": "0"}, {"fixed": "99"}), 1),
        (affects({"introduced": "0"}, {"fixed": JINJA2}), 0),
        (affects({"introduced": JINJA2}), 1),
        (affects({"introduced": "99"}), 0),
        (affects({"introduced": "0"}, {"last_affected": JINJA2}), 1),
        (affects({"introduced": "0"}, {"last_affected": "1.0"}), 0),
        (affects({"fixed": "1.0"}, {"introduced": "2.0"}, {"introduced": "0"}), 1),  # in any order
        (affects({"introduced": "0"}, {"fixed": "1.0"}, {"introduced": "98"}, {"fixed": "99"}), 0),
        (affects(versions=("1.0", JINJA2)), 1),
        (affects(versions=("1.0", "2004d")), 0),
        (affects({"introduced": "0"}, {"fixed": "1.0"}, versions=(JINJA2,)), 1),
        (affects({"introduced": "0"}, name="jinja"), 0),
        (affects({"introduced": "0"}, name="Typing_Extensions"), 1),
        (affects({"introduced": "0"}, name="nvidia-cublas"), 1),
        (affects({"introduced": "0"}, ecosystem="npm"), 0),
        ({"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}, 0),
        (affects({"introduced": "0"}, {"fixed": "next week"}), 3),
    ],
)
def test_audit_tells_affected_versions(
    audit: ModuleType, stored: Callable[..., str], affected: dict[str, Any], status: int
) -> None:
    assert audit.main([stored(affected)]) == status


def test_audit_ignores_what_was_withdrawn(audit: ModuleType, stored: Callable[..., str]) -> None:
    everything = affects({"introduced": "0"})
    assert audit.main([stored(everything, withdrawn="2026-02-01T00:00:00Z")]) == 0
    assert audit.main([stored(everything)]) == 1


def test_audit_names_the_vulnerability(
    audit: ModuleType, stored: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main([stored(affects({"introduced": "0"}), aliases=["CVE-1"], summary="a hole\x1b[2J")]) == 1
    assert f"jinja2 {JINJA2}: 'GHSA-1, CVE-1' 'a hole\\x1b[2J'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), (b"{", "not a zip file"), (b"[3]", "not a zip file")],
)
def test_audit_says_that_it_cant_read_a_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    database = tmp_path / "all.zip"
    if content is not None:
        database.write_bytes(content)
    assert_unknown(database, message)


@pytest.mark.parametrize("content, message", [(b"{", "GHSA-1.json is no JSON"), (None, "holds no record")])
def test_audit_says_that_it_cant_read_a_folder(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "GHSA-1.json").write_bytes(content)
    assert_unknown(tmp_path, message)


def test_audit_says_that_a_download_failed() -> None:
    assert_unknown(None, "AUDIT_DB=all.zip", https_proxy="http://127.0.0.1:9")


def assert_unknown(database: Path | None, message: str, **environment: str) -> None:
    """The script ends with status 3 and one sentence."""
    command = [sys.executable, str(DEPLOY / "audit.py"), *([str(database)] if database else [])]
    answer = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 3, answer.stderr
    assert message in answer.stderr and answer.stderr.startswith("error: the pinned packages could not be audited: ")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [[3], {"id": "GHSA-1"}, {"modified": "2026", "affected": [{"package": 3}]}])
def test_audit_counts_a_record_without_the_known_form(audit: ModuleType, tmp_path: Path, content: Any) -> None:
    (tmp_path / "GHSA-1.json").write_text(json.dumps(content))
    assert audit.main([str(tmp_path)]) == 3


@pytest.fixture
def export() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Address of a server on this machine, and what it answers per path."""
    answers: dict[str, bytes] = {}
    done = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(max(1, len(answers.get(self.path, b"")))))
            self.end_headers()
            if self.path in answers:
                self.wfile.write(answers[self.path])
            else:
                done.wait(30)

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        done.set()
        server.shutdown()


def test_audit_downloads_the_export(
    audit: ModuleType,
    stored: Callable[..., str],
    export: tuple[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, answers = export
    folder = Path(stored(affects({"introduced": "0"})))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(folder / "GHSA-1.json", "GHSA-1.json")
    answers["/all.zip"] = (tmp_path / "all.zip").read_bytes()
    answers["/torn.zip"] = answers["/all.zip"][:-30]
    monkeypatch.setattr(audit, "SILENCE_LIMIT_S", 0.5)
    for path, status in [("/all.zip", 1), ("/torn.zip", 3), ("/silent.zip", 3)]:
        monkeypatch.setattr(audit, "URL", address + path)
        assert audit.main([]) == status
    assert audit.main([str(tmp_path / "all.zip")]) == 1
    assert "timed out" in capsys.readouterr().err
