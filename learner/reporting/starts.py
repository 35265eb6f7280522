"""What a start of a run was: how it was asked for, with which code and versions, on which machine. A line each in
``starts.jsonl``."""

import importlib.metadata
import os
import platform
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from learner.planning.hardware import machine_memory, processor_name
from learner.reporting.metrics_file import LineFile, json_line
from learner.runs.atomic import disk_errors
from learner.runs.directory import RunDirectory
from learner.settings import arguments as overrides
from learner.settings.saved import STARTS, starts
from rollout.code import code_identity

_PACKAGES = ("unmask-rl", "torch", "transformers", "peft", "deepspeed", "ray", "numpy", "safetensors")
_GIT_LIMIT_S = 5.0


def note_start(
    run_dir: RunDirectory,
    argv: Sequence[str],
    *,
    kind: Literal["run", "sft"],
    default_recipe: str | None,
    after: int | None,
    changes: Sequence[str],
) -> dict[str, Any]:
    """Append a line about this start to the run's ``starts.jsonl``, and return what it says.

    Args:
        argv: the command's arguments.
        after: the iteration that the run goes on from; None when it begins.
        changes: settings that differ from those before, as ``key: old -> new``.

    Raises:
        UnmaskError: when the disk refuses.
    """
    run_dir.keep_identity()
    first = next(iter(starts(run_dir.path)), None)
    recipe = overrides.recipe_in(argv, kind) or default_recipe
    row = {
        "time": time.time(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["python", "-m", "learner.sft" if kind == "sft" else "learner.main", *argv]),
        "folder": os.getcwd(),
        "place": str(run_dir.path),
        "goes_on_after": after,
        "changes": list(changes),
        # A run that goes on does so with its own settings, whatever recipe is named.
        "recipe": first.get("recipe") if first else recipe,
        "recipe_settings": first.get("recipe_settings") if first else overrides.settings_of(recipe),
        "code": code(),
        "versions": versions(),
        "machine": machine(),
    }
    file = LineFile(run_dir.path / STARTS)
    with disk_errors(file.path):
        file.append(json_line(row))
        file.sync()
        file.close()
    return row


def code() -> dict[str, Any]:
    """Which source runs: its folder, a digest of what actors run, and the git commit where there is one; ``changed``:
    whether files differ from that commit."""
    found = code_identity()
    commit = _git(found.root, "rev-parse", "HEAD") if (Path(found.root) / ".git").exists() else None
    status = _git(found.root, "status", "--porcelain", "--untracked-files=no") if commit else None
    changed = None if status is None else bool(status)
    return {"folder": found.root, "digest": found.digest, "git_commit": commit, "changed": changed}


def versions() -> dict[str, str | None]:
    """Of Python and of what computes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """What the controller runs on; ranks and actors may be elsewhere, and their nodes are in the run store."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))  # torch would take memory on them to say so
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": machine_memory(),
        "gpus": [_model_of(path.read_text()) for path in gpus],
    }


def _model_of(information: str) -> str:
    found = re.search(r"Model:\s*(.+)", information)
    return found[1].strip() if found else "unknown"


def _git(folder: str, *arguments: str) -> str | None:
    """What git says; None where it isn't there, or refuses."""
    try:
        said = subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, timeout=_GIT_LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()
