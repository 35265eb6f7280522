"""One process of a node computes a digest and the others believe it, as long as it lives and nothing is odd."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.errors import WeightMismatch
from rollout.adapters import PackedTensor, pack, require_loaded
from rollout.vouching import vouched


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "nodes"


def never() -> str:
    raise AssertionError("it was computed again")


def in_another_process(work: Callable[[], object]) -> None:
    """Which has ended when this returns."""
    if (child := os.fork()) == 0:
        work()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_what_one_process_found_the_others_believe(folder: Path) -> None:
    assert vouched("node", "thing", lambda: "found", folder=folder) == "found"
    assert vouched("node", "thing", never, folder=folder) == "found"

    def ask() -> None:
        assert vouched("node", "thing", never, folder=folder) == "found"

    in_another_process(ask)
    assert vouched("node", "another", lambda: "other", folder=folder) == "other"
    assert vouched("node", "thing", lambda: "again", folder=folder) == "again", "the newest is kept"
    assert vouched("far", "thing", lambda: "there", folder=folder) == "there", "each node for itself"
    assert (folder.stat().st_mode & 0o777, (folder / "node").stat().st_mode & 0o777) == (0o700, 0o600)


def test_a_process_that_has_ended_is_not_believed(folder: Path) -> None:
    in_another_process(lambda: vouched("node", "thing", lambda: "found", folder=folder))
    assert (folder / "node").read_text().startswith("thing found ")
    assert vouched("node", "thing", lambda: "mine", folder=folder) == "mine"


def test_nobody_waits_long_for_one_that_hangs(folder: Path) -> None:
    vouched("node", "thing", lambda: "found", folder=folder)
    with (folder / "node").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert vouched("node", "thing", lambda: "mine", folder=folder, patience_s=0.05) == "mine"
    assert vouched("node", "thing", never, folder=folder, patience_s=0.05) == "found"


def test_a_folder_that_others_may_write_is_not_believed(folder: Path) -> None:
    vouched("node", "thing", lambda: "found", folder=folder)
    folder.chmod(0o770)
    assert vouched("node", "thing", lambda: "mine", folder=folder) == "mine"
    folder.chmod(0o700)
    assert vouched("node", "thing", never, folder=folder) == "found"


def test_files_of_old_nodes_go(folder: Path) -> None:
    for node in ("old", "young"):
        vouched(node, "thing", lambda: "found", folder=folder)
    os.utime(folder / "old", (0, time.time() - 100_000))
    vouched("node", "thing", lambda: "found", folder=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["node", "young"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_loaded_is_compared_bit_for_bit(dtype: torch.dtype) -> None:
    held = {"a": torch.randn(3, 5).to(dtype), "b": torch.full((7,), torch.nan, dtype=dtype)}
    state = pack(held)
    require_loaded(held, state)
    flipped = state["b"].data.copy()
    flipped[-2] ^= 1
    assert np.isnan(flipped.view(np.float32)[-1]) if dtype is torch.float32 else True
    with pytest.raises(WeightMismatch, match="b in the model is not what was copied into it"):
        require_loaded(held, {**state, "b": PackedTensor(state["b"].dtype, state["b"].shape, flipped)})
