"""The runs that lie in a folder: which of them a resume goes on with, and the settings that it was started with.

Whoever looked at a run since, or copied something into its folder, changes nothing: each start is a line of
``starts.jsonl`` (``learner.reporting.starts``).
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from learner.settings.sections import RunPlace
from rewards.errors import ConfigError

CONFIG = "config.json"
STARTS = "starts.jsonl"
ASIDE = "set-aside"
"""Folder of a run that holds what its newest resume leaves behind (``learner.runs.aside``)."""
ABOUT, COMPLETE = "about.json", "complete"
"""Files in it: the iteration that the resume went on from; a mark that everything is in it."""

OF_A_START = ("name", "dir", "resume", "dashboard", "restarts", "shared")
"""Settings of the section ``run`` that say nothing about the run itself."""

_CHECKPOINT = re.compile(r"iteration-\d{6,}", re.ASCII)


def run_to_resume(place: RunPlace, kind: Literal["run", "sft"]) -> Path | None:
    """Absolute folder of the run that ``place.resume`` goes on with; None when a new one begins.

    ``auto``: the run of that name if it was ever begun, or without a name the run in ``place.dir`` that was started
    last. A path: the run that this folder or checkpoint belongs to.

    Raises:
        ConfigError: there is no run at the path, or two copies of a run are equally new.
    """
    if place.resume == "never":
        return None
    base = Path(place.dir).expanduser().absolute()
    if place.resume != "auto":
        run = run_of(place.resume)
        if run is None:
            raise ConfigError(
                f"run.resume={place.resume} lies in no run's folder ({CONFIG} is not there); give auto, the folder of "
                "a run or one of its checkpoints"
            )
        return run
    if place.name is not None:
        return base / place.name if is_run(base / place.name) else None
    found = [path for path in base.glob("*") if is_run(path) and kind_of(path) in (None, kind)]
    if not found:
        return None
    newest = max(_started(path) for path in found)
    last = sorted(path.name for path in found if _started(path) == newest)
    if len(last) > 1:
        raise ConfigError(f"{', '.join(last)} in {base} are copies of one run; say with run.name which one goes on")
    return base / last[0]


def run_of(path: str) -> Path | None:
    """Absolute folder of the run that this folder or checkpoint belongs to; None when it belongs to none."""
    given = Path(path).expanduser().absolute()
    return next((run for run in (given, given.parent.parent) if is_run(run)), None)


def is_run(path: Path) -> bool:
    """Whether a run was begun in this folder."""
    return (path / CONFIG).is_file()


def kind_of(path: Path) -> str | None:
    """Of a run's folder: sft when its settings have that section; None when they can't be read."""
    try:
        return "sft" if "sft" in json.loads((path / CONFIG).read_text(encoding="utf-8")) else "run"
    except (OSError, ValueError):
        return None


def saved_settings(path: Path) -> dict[str, Any]:
    """The settings in a run's folder; where its newest resume doesn't count, those before it. Raises ConfigError when
    they can't be read."""
    before = path / ASIDE / CONFIG
    file = before if futile_resume(path) is not None and before.exists() else path / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"'{file}' is not a saved configuration: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"'{file}' is not a saved configuration: it holds no settings")
    return found


def futile_resume(path: Path) -> int | None:
    """The iteration that the run's newest resume went on from, when it ended after its first iteration and before its
    first checkpoint, and therefore is to be undone; None otherwise."""
    aside = path / ASIDE
    try:
        after = int(json.loads((aside / ABOUT).read_text(encoding="utf-8"))["after"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    saved = (aside / COMPLETE).exists() and any(
        iteration_of(each) > after for each in checkpoints_in(path / "checkpoints")
    )
    return None if saved else after


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints below ``folder``, oldest first. What else lies there, such as a copy with a name of its own,
    is no business of the run's."""
    found = [path for path in folder.glob("iteration-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=iteration_of)


def iteration_of(checkpoint: Path) -> int:
    """Of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("iteration-"))


def starts(path: Path) -> list[dict[str, Any]]:
    """What was noted at each start of the run in this folder, the oldest first; empty for a run of an older Unmask."""
    try:
        lines = (path / STARTS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut short by a kill
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _started(path: Path) -> tuple[float, float]:
    """When the run was started last, and when its settings were written, which tells copies apart; Unix seconds."""
    written = (path / CONFIG).stat().st_mtime
    times = [row["time"] for row in starts(path) if isinstance(row.get("time"), int | float)]
    return (times[-1] if times else written), written
