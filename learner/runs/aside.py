"""What a resume leaves behind, kept until the run has something in its place.

A run that goes on from a checkpoint writes what lies beyond it anew: rows of metrics, completions, later checkpoints,
and its settings. These are set aside in ``RUN/set-aside`` when its first iteration is done, and deleted when its first
checkpoint is whole. When the run ended between the two, the next start finds them and puts them back: such a resume was
as good as none.
"""

import json
import os
import secrets
import shutil
from pathlib import Path

from learner.runs import checkpoint as checkpoints
from learner.runs.atomic import atomic_dir, atomic_write_text, disk_errors
from learner.runs.directory import RunDirectory
from learner.settings.saved import ABOUT, ASIDE, COMPLETE, checkpoints_in, futile_resume

_CHECKPOINTS = "checkpoints"


def put_aside(run_dir: RunDirectory, after: int) -> None:
    """Copy the run's settings, metrics and completions aside, and move its checkpoints later than iteration ``after``
    there. Only for the run's writer.

    Raises:
        UnmaskError: when the disk refuses.
    """
    folder = _folder(run_dir)
    with atomic_dir(folder) as inside:
        for path in _files(run_dir):
            if path.exists():
                shutil.copy2(path, inside / path.name)
        (inside / _CHECKPOINTS).mkdir()
        (inside / ABOUT).write_text(json.dumps({"after": after}) + "\n")
    with disk_errors(folder):
        for path in checkpoints.later_than(run_dir.checkpoints_dir, after):
            os.rename(path, folder / _CHECKPOINTS / path.name)
    atomic_write_text(folder / COMPLETE, "")


def put_back(run_dir: RunDirectory) -> int | None:
    """Undo a resume that ended before its first checkpoint; delete what one that didn't left here. Only for the run's
    writer.

    Returns:
        The iteration that it went on from; None when there was nothing to undo.

    Raises:
        UnmaskError: when the disk refuses.
    """
    folder, after = _folder(run_dir), futile_resume(run_dir.path)
    if after is not None:
        with disk_errors(folder):
            (folder / COMPLETE).unlink(missing_ok=True)  # what now lies beside is not that resume's first checkpoint
            for path in checkpoints_in(folder / _CHECKPOINTS):
                os.rename(path, run_dir.checkpoints_dir / path.name)
            for path in _files(run_dir):
                if (folder / path.name).exists():
                    os.replace(folder / path.name, path)
    discard(run_dir)
    return after


def discard(run_dir: RunDirectory) -> None:
    """Delete what was set aside. Nothing happens when there is nothing. Raises UnmaskError when the disk refuses."""
    folder = _folder(run_dir)
    if (folder / ABOUT).exists():
        with disk_errors(folder):
            gone = folder.with_name(
                f".{folder.name}.tmp-{secrets.token_hex(4)}"
            )  # a leftover, if we die while we delete it
            os.rename(folder, gone)
            shutil.rmtree(gone)


def _folder(run_dir: RunDirectory) -> Path:
    return run_dir.path / ASIDE


def _files(run_dir: RunDirectory) -> tuple[Path, ...]:
    return run_dir.config_path, run_dir.metrics_path, run_dir.samples_path
