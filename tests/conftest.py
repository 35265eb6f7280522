"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with recorded reference cases and data sets; it lies beside a developer's checkout, never inside it."""
    path = Path(os.environ.get("UNMASK_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (path / "golden").is_dir():
        pytest.skip(f"no recorded cases at {path}; set UNMASK_SHARED to the folder that holds golden/ and data/")
    return path
