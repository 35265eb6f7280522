"""Which recorded cases a folder holds: AGRPO's in the folder itself, each other method's in a folder of its own."""

import pkgutil
from pathlib import Path
from typing import NamedTuple

from learner.verification import methods
from learner.verification.cases import case_names
from rewards.errors import ConfigError


class MethodFile(NamedTuple):
    """A recorded case of a method."""

    folder: Path
    """Its name is the method's."""
    name: str


class Recorded(NamedTuple):
    """What a folder holds."""

    agrpo: list[str]
    """Cases of the reference AGRPO code, in the folder itself."""
    methods: list[MethodFile]
    unknown: list[str]
    """Folders of cases of methods that aren't here, as paths below the folder."""


def known_methods() -> set[str]:
    """Names of the folders of cases that can be checked: the modules of ``learner.verification.methods``."""
    return {module.name for module in pkgutil.iter_modules(methods.__path__)} - {"case"}


def recorded_cases(golden: Path) -> Recorded:
    """All cases in a folder: of tests/golden, its ``methods``, or one method's in there, or another laid out so.

    Raises:
        ConfigError: when it is no folder or holds none.
    """
    if not golden.is_dir():
        raise ConfigError(f"--golden {golden} is not a folder; a checkout has recorded cases in tests/golden")
    golden, known = golden.resolve(), known_methods()
    inside = [golden] if golden.name in known or golden.parent.name == "methods" else _subfolders(golden)
    if (golden / "methods").is_dir():
        inside = [*(folder for folder in inside if folder.name != "methods"), *_subfolders(golden / "methods")]
    agrpo = [] if inside == [golden] else case_names(golden)
    found = [MethodFile(folder, name) for folder in inside if folder.name in known for name in case_names(folder)]
    strange = [folder for folder in inside if folder.name not in known and any(folder.rglob("*.npz"))]
    unknown = [folder.name if folder == golden else str(folder.relative_to(golden)) for folder in strange]
    if not (agrpo or found or unknown):
        raise ConfigError(f"--golden {golden} holds no recorded case; cases are called NN_name.npz and NN_name.json")
    return Recorded(agrpo, found, unknown)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())
