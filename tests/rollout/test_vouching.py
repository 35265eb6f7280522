"""One process of a node computes a digest and the others believe it, as long as it lives and nothing is odd."""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

import rollout.vouching
from learner.bench import adapter_holder
from learner.bench.adapter_holder import AdapterHolder, adapter_shapes
from learner.ranks.rank import PublishedAdapter
from learner.supply.publish import publish
from rewards.errors import WeightMismatch
from rollout.adapters import AdapterState, PackedTensor, digest, load_state, pack, require_loaded
from rollout.messages import Weights
from rollout.vouching import vouched
from tests.support.learner_ranks import importing_ray


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


class Counting(AdapterHolder):
    """Tells how often it computed a digest."""

    computed = 0

    def load_counted(self, weights: Weights, *, flip: bool = False) -> int:
        """``flip``: a bit of what was copied into the parameters."""

        def counted(state: AdapterState) -> str:
            self.computed += 1
            return digest(state)

        def flipped(module: torch.nn.Module, state: AdapterState) -> None:
            load_state(module, state)
            next(module.parameters()).data.view(torch.int16)[-1, -1] ^= 1

        vars(rollout.vouching).update(digest=counted)
        vars(adapter_holder).update(load_state=flipped if flip else load_state)
        self.load(weights.refs, weights.digest, 60.0)
        return self.computed


@pytest.mark.slow
@pytest.mark.heavy
def test_of_a_large_adapter_one_holder_of_a_node_computes_the_digest_and_wrong_weights_are_refused() -> None:
    def published(shapes: dict[str, tuple[int, int]]) -> Weights:
        state = pack({name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()})
        return publish(1, PublishedAdapter(state, digest(state), {}))

    large, small = (adapter_shapes(d_model=256, mlp=512, layers=layers, r=32) for layers in (8, 1))
    counts = []
    with importing_ray(cpus=2):
        for shapes in (large, small):
            holders: list[Any] = [ray.remote(Counting).remote(shapes) for _ in range(3)]
            weights = published(shapes)
            counts.append(sum(ray.get([holder.load_counted.remote(weights) for holder in holders], timeout=120)))
            others = weights._replace(digest=published(shapes).digest)
            for wrong, how in ((others, {}), (weights, {"flip": True})):
                for holder in holders:
                    with pytest.raises(WeightMismatch):
                        ray.get(holder.load_counted.remote(wrong, **how), timeout=120)
    assert counts == [1, 3], "what is small isn't shared, so each computes its own"
