"""Checkpoints: whole or not at all, damage found and named, and an optimizer that goes on bit for bit."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save as save_safetensors

from learner.ranks.group import LearnerGroup
from learner.runs import checkpoint
from learner.runs.checkpoint import (
    Checkpoint,
    Progress,
    later_than,
    load,
    newest_good,
    prune,
    require_layout,
    save,
)
from learner.settings.saved import checkpoints_in
from rewards.errors import CheckpointError
from rollout.adapters import AdapterState, digest, pack
from tests.support.hand_made import random_group
from tests.support.learner_ranks import (
    ProbedGroup,
    adamw_steps,
    draw_batch,
    importing_ray,
    put,
    random_adapter,
    settings,
)

LAYOUT = {"ranks": 2, "zero_stage": 2, "dtype": "float32"}
PEFT_CONFIG = {"peft_type": "LORA", "r": 2, "target_modules": "a|b"}
FILES = (
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "optimizer-0000.safetensors",
    "optimizer-0001.safetensors",
    "phase-teacher.safetensors",
    "phase-mean.safetensors",
    "buffer/00000007.safetensors",
    "state.json",
    "manifest.json",
)


def make(iteration: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(iteration)
    adapter = pack(
        {
            "model.a.lora_A.weight": torch.randn(2, 6, generator=generator),
            "model.a.lora_B.weight": torch.randn(6, 2, generator=generator).bfloat16(),
        }
    )
    progress = Progress(
        iteration=iteration,
        policy_version=iteration,
        adapter_digest=digest(adapter),
        updates=2 * iteration,
        nonfinite_in_a_row=1,
        ledger={"next_group": 40, "consumed": [1, 2], "ready": {}},
        layout=LAYOUT,
        best={"iteration": 1, "solve_rate": 0.1 + 0.2},
        evaluations={"base": {"m": 0.25}},
        evaluated_at=0,
        train_seconds=1.5,
    )
    shards = [save_safetensors({"master.0": torch.full((5,), float(rank))}) for rank in range(2)]
    return Checkpoint(progress, adapter, PEFT_CONFIG, shards, {"teacher": adapter, "mean": adapter}, [random_group(7)])


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert a.progress == b.progress and a.peft_config == b.peft_config
    assert digest(a.adapter) == digest(b.adapter)
    assert list(a.shards) == list(b.shards)
    assert {name: digest(s) for name, s in a.phase.items()} == {name: digest(s) for name, s in b.phase.items()}
    assert [group.group_id for group in a.buffer] == [group.group_id for group in b.buffer]
    for ours, theirs in zip(a.buffer, b.buffer, strict=True):
        assert (ours.completion_ids == theirs.completion_ids).all() and ours.sampler == theirs.sampler


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder with checkpoints of iterations 9, 10 and 11."""
    for iteration in (9, 10, 11):
        save(tmp_path, make(iteration))
    return tmp_path


# ---- whole or not at all


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = save(tmp_path, make(40))
    assert path == tmp_path / "iteration-000040"
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == sorted(FILES)
    assert_same(load(path), make(40))
    assert all(suffix in (".json", ".safetensors") for suffix in {Path(name).suffix for name in FILES}), "no pickle"


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path):
    save(tmp_path, make(3))
    newer = dataclasses.replace(make(3), shards=[b"other", b"shards"])
    assert_same(load(save(tmp_path, newer)), newer)
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-000003"]


def test_checkpoints_are_listed_oldest_first(three):
    (three / "iteration-000012").write_text("a file")
    (three / "other").mkdir()
    assert [path.name for path in checkpoints_in(three)] == ["iteration-000009", "iteration-000010", "iteration-000011"]
    assert checkpoints_in(three / "nowhere") == []


def test_copies_with_names_of_their_own_are_no_business_of_a_runs(three):
    """Seen: a copy ended every resume with a traceback, and backups were deleted with the old checkpoints."""
    for copy in ("iteration-000009-keep", "iteration-000010.bak", "iteration-000020-good", "iteration-000099 (copy)"):
        shutil.copytree(three / "iteration-000009", three / copy)
    (three / "iteration-\N{ARABIC-INDIC DIGIT ONE}00000").mkdir()
    before = sorted(path.name for path in three.iterdir())
    assert newest_good(three, on_damaged=pytest.fail).progress.iteration == 11
    assert [path.name for path in later_than(three, 9)] == ["iteration-000010", "iteration-000011"]
    prune(three, keep=1, best_iteration=None)
    left = sorted(path.name for path in three.iterdir())
    assert set(before) - set(left) == {"iteration-000009", "iteration-000010"}
    save(three, make(1_000_000))
    assert checkpoints_in(three)[-1].name == "iteration-1000000", "by number, not by name"


def test_an_error_while_writing_leaves_nothing_and_the_old_one_whole(three, monkeypatch):
    def fails(*args):
        raise RuntimeError("no adapter today")

    monkeypatch.setattr(checkpoint, "write_peft_folder", fails)
    for iteration in (11, 12):
        with pytest.raises(RuntimeError, match="today"):
            save(three, make(iteration))
    assert len(list(three.iterdir())) == 3
    assert_same(load(checkpoints_in(three)[-1]), make(11))


@pytest.mark.parametrize("last_write", ["write_peft_folder", "_sha256"])
def test_a_process_that_dies_while_writing_leaves_no_checkpoint(three, monkeypatch, last_write):
    """Without any clean-up, as SIGKILL would have it: what was written is there, under a name that nothing lists."""
    monkeypatch.setattr(checkpoint, last_write, lambda *args: os._exit(9))
    child = os.fork()
    if child == 0:
        save(three, make(12))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert len(list(three.iterdir())) == 4, "control: the child had begun to write"
    assert [path.name for path in checkpoints_in(three)] == ["iteration-000009", "iteration-000010", "iteration-000011"]
    newest = newest_good(three, on_damaged=pytest.fail)
    assert newest is not None and newest.progress.iteration == 11
    assert_same(load(save(three, make(12))), make(12))


# ---- damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_in_any_file_is_found_and_the_file_named(tmp_path, name):
    path = save(tmp_path, make(1))
    size = (path / name).stat().st_size
    for place in {0, size // 3, size // 2, size - 2, size - 1}:
        flip(path / name, place)
        with pytest.raises(CheckpointError) as caught:
            load(path)
        expected = str(path) if name == "manifest.json" else f"{path / name} is damaged"
        assert expected in str(caught.value)
        flip(path / name, place)
    assert_same(load(path), make(1))


def test_no_flipped_bit_in_the_manifest_gets_through(tmp_path):
    """The manifest vouches for the other files, and nothing vouches for it. (A flip can turn one shard's name into
    another's, which leaves well-formed JSON with a file less.)"""
    path = save(tmp_path, make(1))
    for place in range((path / "manifest.json").stat().st_size):
        flip(path / "manifest.json", place)
        with pytest.raises(CheckpointError, match="iteration-000001"):
            load(path)
        flip(path / "manifest.json", place)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_is_found_and_named(tmp_path, name):
    path = save(tmp_path, make(1))
    data = (path / name).read_bytes()
    for damaged in (b"", data[: len(data) // 2]):
        (path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="iteration-000001" if name == "manifest.json" else name):
            load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(path)


def test_an_adapter_of_another_checkpoint_is_found(tmp_path):
    """Consistent files, put together from two checkpoints."""
    path, other = save(tmp_path, make(1)), save(tmp_path, make(2))
    shutil.rmtree(path / "adapter")
    shutil.copytree(other / "adapter", path / "adapter")
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (path, other)]
    for name in FILES[:2]:
        manifests[0]["sha256"][name] = manifests[1]["sha256"][name]
    (path / "manifest.json").write_text(json.dumps(manifests[0]))
    with pytest.raises(CheckpointError, match=r"iteration-000001 is not the one that its state\.json names"):
        load(path)


def test_another_format_is_refused_by_number(tmp_path):
    path = save(tmp_path, make(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match=f"format 99, this version reads {checkpoint.FORMAT}"):
        load(path)


def test_the_newest_good_one_is_taken_and_damaged_ones_are_reported(three):
    told: list[CheckpointError] = []
    found = newest_good(three, on_damaged=told.append)
    assert found is not None and found.progress.iteration == 11 and not told
    flip(three / "iteration-000011" / "optimizer-0001.safetensors", 50)
    (three / "iteration-000010" / "state.json").write_text("{")
    found = newest_good(three, on_damaged=told.append)
    assert found is not None and found.progress.iteration == 9
    assert len(told) == 2
    assert "iteration-000011/optimizer-0001" in str(told[0]) and "iteration-000010/state.json" in str(told[1])
    (three / "iteration-000009" / "manifest.json").unlink()
    assert newest_good(three, on_damaged=told.append) is None
    assert len(told) == 5
    assert len(checkpoints_in(three)) == 3, "damaged ones are left for a person to look at"


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for iteration in range(1, 7):
        save(tmp_path, make(iteration))

    def kept() -> list[int]:
        return [int(path.name.removeprefix("iteration-")) for path in checkpoints_in(tmp_path)]

    assert prune(tmp_path, keep=9, best_iteration=None) == []
    assert kept() == [1, 2, 3, 4, 5, 6]
    assert prune(tmp_path, keep=3, best_iteration=2) == [1, 3]
    assert kept() == [2, 4, 5, 6]
    prune(tmp_path, keep=2, best_iteration=6)
    assert kept() == [5, 6]
    prune(tmp_path, keep=1, best_iteration=None)
    assert kept() == [6]


@pytest.mark.parametrize(("key", "value"), [("ranks", 1), ("zero_stage", 3), ("dtype", "bfloat16"), ("new", 0)])
def test_another_layout_is_refused_by_name(key, value):
    require_layout(make(1).progress, LAYOUT)
    with pytest.raises(CheckpointError, match=rf"learner\.{key}=.*this run has {value}"):
        require_layout(make(1).progress, {**LAYOUT, key: value})


# ---- the optimizer goes on bit for bit


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with importing_ray(cpus=4):
        yield


@pytest.fixture(scope="module")
def ranks(cluster, tiny_model) -> Iterator[ProbedGroup]:
    """Two ranks; each test restarts what is in them."""
    group = ProbedGroup(settings(learner__ranks=2), tiny_model)
    yield group
    group.close()


@pytest.fixture(scope="module")
def start(tiny_model) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def refs(cluster, tiny_model, start) -> list[ray.ObjectRef]:
    return put(draw_batch(tiny_model, settings(), start))


def two_updates_and_a_third(group: ProbedGroup, refs, folder: Path) -> tuple[Checkpoint, str, list[bytes]]:
    """A checkpoint after the second update, read back from disk; adapter digest and shards after the third."""
    for index in range(2):
        assert group.update(refs, index, 1e-3).applied
    adapter = group.publish()
    progress = dataclasses.replace(make(2).progress, adapter_digest=adapter.digest)
    path = save(folder, Checkpoint(progress, adapter.state, adapter.peft_config, group.export()))
    assert group.update(refs, 2, 1e-3).applied
    return load(path), group.publish().digest, group.export()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "dtype"),
    [(0, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16")],
)
def test_a_resumed_optimizer_goes_on_bit_for_bit(ranks, tiny_model, refs, tmp_path, stage, dtype):
    config = settings(learner__ranks=2, learner__zero_stage=stage, learner__dtype=dtype, learner__weight_decay=0.01)
    ranks.restart(config, random_adapter(tiny_model, config))
    kept, third, shards = two_updates_and_a_third(ranks, refs, tmp_path)

    ranks.restart(config, kept.adapter, kept.shards)
    assert ranks.publish().digest == digest(kept.adapter) and ranks.export() == list(kept.shards)
    assert ranks.update(refs, 2, 1e-3).applied
    assert ranks.publish().digest == third and ranks.export() == shards and adamw_steps(ranks) == {3}

    ranks.restart(config, kept.adapter)
    ranks.update(refs, 2, 1e-3)
    assert ranks.publish().digest != third, "control: without the moments the third update is another"


@pytest.mark.slow
def test_a_resume_in_new_processes_goes_on_bit_for_bit(ranks, tiny_model, start, refs, tmp_path):
    config = settings(learner__ranks=2, learner__zero_stage=2)
    kept, third, shards = two_updates_and_a_third(ranks.restart(config, start), refs, tmp_path)
    pids = {description["pid"] for description in ranks.descriptions}
    group = LearnerGroup(config, tiny_model, adapter=kept.adapter, shards=kept.shards)
    try:
        assert not pids & {description["pid"] for description in group.descriptions}
        assert group.update(refs, 2, 1e-3).applied
        assert group.publish().digest == third and group.commit().shards == shards
    finally:
        group.close()
