"""Which code a process runs, so that a mix of two versions is refused."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from rewards.errors import ConfigError

PACKAGES = ("rewards", "rollout", "learner", "services")


@dataclass(frozen=True)
class CodeIdentity:
    """Which source files an actor runs: the folder of our packages, and a sha256 over those that actors import."""

    root: str
    digest: str


def code_identity() -> CodeIdentity:
    """Identity of the running code.

    Raises:
        ConfigError: our packages don't lie beside each other, so that a mix of two versions would run.
    """
    roots = {name: _folder(name).parent for name in PACKAGES}
    if len(set(roots.values())) != 1:
        where = ", ".join(f"{name} in {root}" for name, root in roots.items())
        raise ConfigError(f"packages of two installations are mixed: {where}; remove one from the path")
    root = roots["rewards"]
    sha = hashlib.sha256()
    for path in sorted(path for name in ("rewards", "rollout") for path in (root / name).rglob("*.py")):
        sha.update(f"{path.relative_to(root)}|".encode() + path.read_bytes())
    return CodeIdentity(str(root), sha.hexdigest())


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"package {package} is not installed beside {Path(__file__).parent}; install unmask-rl whole")
    return Path(spec.origin).resolve().parent
