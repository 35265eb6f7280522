"""The one C++ op that DeepSpeed compiles at first use (its shared-memory collectives for CPU ranks), built in advance.

``python -m learner.ranks.build_ops`` builds it into ``<environment>/torch_extensions`` (about half a minute), or, where
that can't be written, into the cache of bases. A rank calls ``prepare_environment`` before it imports DeepSpeed; on a
machine where nothing was built, the rank builds it then.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from learner.runs.stopping import exit_status
from learner.settings.sections import ModelSection
from rewards.command import Parser
from rewards.errors import ConfigError
from rollout.process import prepare_process

OP_NAME = "deepspeed_shm_comm"


def prepare_environment(device: str) -> Path:
    """Makes DeepSpeed's build of the op safe in this process, and returns the folder that holds built ops.

    device: "cpu", whose ranks need the op, or "cuda", whose ranks build nothing.

    Sets TORCH_EXTENSIONS_DIR to a folder of this environment or of the cache unless it is set, puts the interpreter's
    folder on PATH (the wheel's ``ninja`` sits there), and removes build locks whose builder is dead, as torch would
    wait for them for ever. Raises ConfigError when no folder can be written, which torch does for an op that is built
    too, or the op has yet to be built and there is no C++ compiler.
    """
    folder = _folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    scripts = str(Path(sys.executable).parent)  # not resolved: the environment's bin, not the base interpreter's
    search_path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if scripts not in search_path:
        os.environ["PATH"] = os.pathsep.join([scripts, *search_path])
    remove_dead_locks(folder)
    compiler = os.environ.get("CXX", "c++")
    if device == "cpu" and not (folder / OP_NAME / f"{OP_NAME}.so").exists() and shutil.which(compiler) is None:
        raise ConfigError(
            f"DeepSpeed has to compile a small op, and there is no C++ compiler '{compiler}'; "
            "install one (apt-get install g++) or name it in the environment variable CXX"
        )
    return folder


def _folder() -> Path:
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    ours = (Path(sys.prefix) / "torch_extensions", ModelSection().cache_path / "torch_extensions")
    refused = []
    for folder in (Path(named),) if named else ours:
        try:
            place = folder / OP_NAME
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
            return folder
        except OSError as error:
            refused.append(f"{folder} ({error.strerror})")
    raise ConfigError(
        f"DeepSpeed's op can't be kept in {' nor in '.join(refused)}; set TORCH_EXTENSIONS_DIR to a folder that can be "
        "written"
    )


def remove_dead_locks(folder: Path) -> list[Path]:
    """Removes the build locks below ``folder`` that no process of this machine holds open; returns them."""
    locks = list(folder.glob("*/lock"))
    if not locks:
        return []
    time.sleep(0.05)  # a lock's file can be seen an instant before its builder's open descriptor
    held = _open_files()
    dead = [lock for lock in locks if lock.resolve() not in held]
    for lock in dead:
        lock.unlink(missing_ok=True)
    return dead


def build() -> None:
    """Builds the op, or checks in well under a second that it is up to date; a GPU build of torch needs none."""
    import torch

    folder = prepare_environment("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.accelerator import get_accelerator  # slow to import, and only after the environment is prepared

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        print(f"{OP_NAME} is not needed on {get_accelerator().device_name()}")
        return
    start = time.monotonic()
    builder.load()
    print(f"{OP_NAME} is ready in {folder} ({time.monotonic() - start:.0f} s)")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 when there is no compiler."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    Parser("python -m learner.ranks.build_ops", description="Build DeepSpeed's op in advance.").parse_args(argv)
    build()
    return 0


def _open_files() -> set[Path]:
    """Files that the processes of this machine hold open, as far as this user may see."""
    files = set()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            files.add(Path(os.readlink(descriptor)))
        except OSError:  # the process ended, or belongs to another user
            continue
    return files


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
