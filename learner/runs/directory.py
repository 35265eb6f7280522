"""The run directory: where everything of one run lies, and the lock that keeps a second writer out.

runs/<id>/
  config.json     the resolved configuration        store.sqlite   run store (services.store)
  metrics.jsonl   one JSON object a report          summary.json   base against trained
  plots/  checkpoints/  adapter/ (PEFT)  samples/   run.lock       who writes here
  run.uuid        tells the run from others of its name
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from learner.runs.atomic import atomic_write_text, disk_errors, recover_replaced, remove_leftovers
from learner.settings.run import name_problems
from rewards.errors import ConfigError
from services.store.schema import sqlite_url


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
        self._lock: int | None = None

    @classmethod
    def create(
        cls, base: Path | str, name: str | None = None, *, label: str = "run", shared: bool = False
    ) -> "RunDirectory":
        """Make ``base/name``; without a name the id is time stamp, label and four random hex digits. Only its owner can
        look into it unless it is ``shared``: completions, settings and logs are in it.

        Raises ``ConfigError`` for a name that is no plain folder name or is taken, ``UnmaskError`` when the disk
        refuses.
        """
        if name is None:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.") or "run"
            name = f"{time.strftime('%Y%m%d-%H%M%S')}-{stem}-{secrets.token_hex(2)}"
        elif problems := name_problems(name):
            raise ConfigError(problems[0])
        run = cls(Path(base) / name)
        with disk_errors(run.path):
            if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
                raise ConfigError(f"run directory {run.path} exists already: choose another name, or resume that run")
            run.path.parent.mkdir(parents=True, exist_ok=True)
            run.path.mkdir(mode=0o777 if shared else 0o700, exist_ok=True)
            if not shared:
                run.path.chmod(0o700)  # an empty folder that was there
            run.samples_dir.mkdir(exist_ok=True)
            run.plots_dir.mkdir(exist_ok=True)
            run.checkpoints_dir.mkdir(exist_ok=True)
        run._acquire()
        atomic_write_text(run._uuid_path, f"{uuid.uuid4()}\n")
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
        Raises ``UnmaskError`` when the disk refuses."""
        with disk_errors(self._uuid_path), contextlib.suppress(FileNotFoundError):
            return self._uuid_path.read_text().strip()
        return ""

    def write_config(self, text: str) -> None:
        """Save the resolved configuration (JSON text). Raises ``UnmaskError`` when the disk refuses."""
        atomic_write_text(self.config_path, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Save the summary as JSON. Raises ``UnmaskError`` when the disk refuses."""
        atomic_write_text(self.summary_path, json.dumps(summary, indent=2) + "\n")

    def close(self) -> None:
        """Give the lock back. A second call does nothing."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def _acquire(self) -> None:
        """Take ``run.lock``. The kernel holds the lock and drops it with the process, however that ends, so a dead
        owner never has to be guessed from its pid (which may be a zombie's, or another process's by now); the pid in
        the file is there for the message.
        """
        path = self.path / "run.lock"
        with disk_errors(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            except BlockingIOError:
                owner = _owner(descriptor)
                os.close(descriptor)
                raise ConfigError(
                    f"run directory {self.path} is being written by {owner}: stop that process or choose "
                    f"another run directory"
                ) from None
            except OSError:
                os.close(descriptor)
                raise
        self._lock = descriptor


def _owner(descriptor: int) -> str:
    with contextlib.suppress(ValueError, KeyError):  # caught between its lock and its line
        record = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {record['pid']} on {record['host']}"
    return "another process"
