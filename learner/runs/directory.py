"""The run directory: where everything of one run lies, and the lock that keeps a second writer out.

runs/<id>/
  config.json     the resolved configuration        store.sqlite   run store (services.store)
  starts.jsonl    a line each time it was started   set-aside/     see learner.runs.aside
  metrics.jsonl   one JSON object a report          summary.json   base against trained
  plots/  checkpoints/  adapter/ (PEFT)  samples/   run.lock       who writes here
  run.uuid        tells the run from others of its name
"""

import contextlib
import json
import re
import secrets
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from learner.runs.atomic import atomic_write_text, disk_errors, recover_replaced, remove_leftovers
from learner.runs.lock import FileLock, Held
from learner.settings.run import name_problems
from learner.settings.saved import checkpoints_in, starts
from rewards.errors import ConfigError
from services.store.schema import sqlite_url

_LOCK = "run.lock"
_SKELETON = {_LOCK, "run.uuid", "samples", "plots", "checkpoints"}
_UNBEGUN = _SKELETON | {
    *("config.json", "starts.jsonl", "metrics.jsonl", "data.json", "tensorboard", "wandb"),
    *("store.sqlite", "store.sqlite-wal", "store.sqlite-shm"),
}
"""What may lie in the folder of a run that never had an iteration."""


def new_name(label: str) -> str:
    """Of a run that is given none: time stamp, label and four random hex digits."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}-{secrets.token_hex(2)}"


class RunDirectory:
    """Paths of one run. ``RunDirectory(path)`` only names them, for readers; ``create`` and ``open`` are for the one
    process that writes: they hold the lock until ``close`` (or the end of a ``with`` block, or of the process).
    """

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self.id = self.path.name
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.store_path = self.path / "store.sqlite"
        self.store_url = sqlite_url(self.store_path)
        self.summary_path = self.path / "summary.json"
        self.plots_dir = self.path / "plots"
        self.checkpoints_dir = self.path / "checkpoints"
        self.adapter_dir = self.path / "adapter"
        self.samples_dir = self.path / "samples"
        self.samples_path = self.samples_dir / "completions.jsonl"
        self._uuid_path = self.path / "run.uuid"
        self.is_new = False
        """Made by ``create``: nothing of a run is in it."""
        self.undone: int | None = None
        """The iteration after which a resume that ended before its first checkpoint went on, when one was undone."""
        self._lock: FileLock | None = None

    @classmethod
    def create(
        cls, base: Path | str, name: str | None = None, *, label: str = "run", shared: bool = False
    ) -> "RunDirectory":
        """Make ``base/name``; without a name it is a ``new_name``. Only its owner can
        look into it unless it is ``shared``: completions, settings and logs are in it.

        A name whose run never began (it has no iteration and no checkpoint) is as good as a new one.

        Raises ``ConfigError`` for a name that is no plain folder name or is taken, ``UnmaskError`` when the disk
        refuses.
        """
        if name is None:
            name = new_name(label)
        elif problems := name_problems(name):
            raise ConfigError(problems[0])
        run = cls(Path(base) / name)
        with disk_errors(run.path):
            run._refuse_taken()
            make_folder(run.path, shared=shared)
            if not shared:
                run.path.chmod(0o700)  # a folder that was there
        run._acquire()
        with contextlib.ExitStack() as failed, disk_errors(run.path):
            failed.callback(run.close)
            run._refuse_taken()  # by whoever had the lock before us
            for folder in (run.samples_dir, run.plots_dir, run.checkpoints_dir):
                folder.mkdir(exist_ok=True)
            if not run.identity:
                atomic_write_text(run._uuid_path, f"{uuid.uuid4()}\n")
            failed.pop_all()
        run.is_new = True
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunDirectory":
        """Take over an existing run directory as its writer and clear what a killed writer left half-written.

        Raises ``ConfigError`` when there is no run at ``path`` or another live process writes it.
        """
        run = cls(path)
        if not run.config_path.is_file():
            raise ConfigError(f"no run at {run.path}: config.json is not there; give the folder of an earlier run")
        run._acquire()
        with disk_errors(run.path):
            recover_replaced(run.adapter_dir)
            for folder in (run.path, run.checkpoints_dir, run.samples_dir):
                folder.mkdir(exist_ok=True)
                remove_leftovers(folder)
        return run

    @property
    def identity(self) -> str:
        """Tells the run from others of its name, wherever its records lie; empty for a run of an Unmask that gave none.
        A folder that was renamed is the same run. A copy under another name, beside what it is a copy of, is another
        one. Raises ``UnmaskError`` when the disk refuses."""
        kept = self._kept_identity()
        places = [Path(start["place"]) for start in starts(self.path) if isinstance(start.get("place"), str)]
        before = places[-1] if places else self.path
        if kept and before.name != self.id and RunDirectory(before)._kept_identity() == kept:
            return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{kept} {self.id}"))
        return kept

    def keep_identity(self) -> None:
        """To be called at each start, before it is noted under the folder's present name. Raises ``UnmaskError`` when
        the disk refuses."""
        if self.identity != self._kept_identity():
            atomic_write_text(self._uuid_path, f"{self.identity}\n")

    def _kept_identity(self) -> str:
        with disk_errors(self._uuid_path), contextlib.suppress(FileNotFoundError):
            return self._uuid_path.read_text().strip()
        return ""

    def write_config(self, text: str) -> None:
        """Save the resolved configuration (JSON text). Raises ``UnmaskError`` when the disk refuses."""
        atomic_write_text(self.config_path, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Save the summary as JSON. Raises ``UnmaskError`` when the disk refuses."""
        atomic_write_text(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def remove_unless_begun(self) -> None:
        """Take the folder of a new run away again when it ended before anything was written into it."""
        if {path.name for path in self.path.iterdir()} <= _SKELETON:
            with contextlib.suppress(OSError):  # somebody else's file is in it
                for folder in (self.samples_dir, self.plots_dir, self.checkpoints_dir):
                    folder.rmdir()
                self._uuid_path.unlink(missing_ok=True)
                (self.path / _LOCK).unlink(missing_ok=True)
                self.path.rmdir()

    def close(self) -> None:
        """Give the lock back. A second call does nothing."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_taken(self) -> None:
        if not self.path.exists():
            return
        foreign = not self.path.is_dir() or {path.name for path in self.path.iterdir()} - _UNBEGUN
        if foreign or checkpoints_in(self.checkpoints_dir) or self._has_iterations():
            raise ConfigError(f"run directory {self.path} exists already: choose another name, or resume that run")

    def _has_iterations(self) -> bool:
        """Rows of metrics.jsonl beyond the base's evaluation, which is iteration 0."""
        with contextlib.suppress(FileNotFoundError):
            found = re.findall(r'"iteration": (\d+)', self.metrics_path.read_text(errors="replace"))
            return any(int(iteration) > 0 for iteration in found)
        return False

    def _acquire(self) -> None:
        try:
            self._lock = FileLock(self.path / _LOCK)
        except Held as owner:
            raise ConfigError(
                f"run directory {self.path} is being written by {owner}: stop that process or choose "
                f"another run directory"
            ) from None


def make_folder(path: Path, *, shared: bool) -> None:
    """Make a folder for completions, settings and logs unless it is there: its owner's alone, or ``shared`` as the
    umask says."""
    path.mkdir(mode=0o777 if shared else 0o700, parents=True, exist_ok=True)
