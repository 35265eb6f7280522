"""docs/loop.py, which shows the whole method on one process, still does what it says."""

import math
import runpy
from pathlib import Path

from rollout.adapters import read_peft_folder, unpack

LOOP = Path(__file__).resolve().parents[2] / "docs" / "loop.py"


def changed(folder: Path) -> bool:
    """Whether the adapter in the folder does anything: a fresh one's B matrices are 0."""
    state, _ = read_peft_folder(folder)
    return any(bool(unpack(tensor).any()) for name, tensor in state.items() if ".lora_B." in name)


def test_the_loop_learns_and_leaves_an_adapter(tmp_path: Path) -> None:
    train = runpy.run_path(str(LOOP))["main"]
    assert train(0, tmp_path / "fresh") == [] and not changed(tmp_path / "fresh"), "the control"
    rows = train(6, tmp_path / "trained")
    assert all(math.isfinite(row["reward"]) and math.isfinite(row["loss"]) for row in rows)
    assert changed(tmp_path / "trained")
    rewards = [row["reward"] for row in rows]
    assert sum(rewards[-2:]) > 1.5 * sum(rewards[:2]) > 0, rewards
