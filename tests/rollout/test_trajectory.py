"""The trajectory contract: what ``validate`` refuses, and files that come back as they were or are refused."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from rewards.errors import DataError, TrajectoryError
from rollout.trajectory import SCHEMA_VERSION, SamplerSpec, TrajectoryGroup
from tests.support.hand_made import make_group

EOS = 9
G, C, STEPS = 2, 4, 2


@pytest.fixture
def group() -> TrajectoryGroup:
    """Truncated; row 1 is EOS from its first block on, so its last two positions are fillers."""
    return make_group(
        [[1, 2, 3, 4], [EOS, EOS, EOS, EOS]],
        [[0, 0, 1, 1], [0, 0, 1, 1]],
        steps=STEPS,
        drawn=[[1, 1, 1, 1], [1, 1, 0, 0]],
        logp=[[-0.1, -0.2, -0.3, -0.4], [-0.5, 0.0, 0, 0]],
        rewards=[[1.0, 0.5], [0.0, 0.25]],
        support_indptr=np.array([0, 1, 3, 4, 6, 7, 9, 9, 9]),
        support_ids=np.array([1, 2, 7, 3, 4, 8, EOS, 8, EOS], dtype=np.int32),
        sampler=SamplerSpec(C, 2, STEPS, "random", 0.7, top_k=2),
        group_id=41,
        actor_id="rollout-3",
        policy_version=5,
        adapter_digest="abc",
        seed=2**62 + 1,
        counters={"grader_timeouts": 1},
        correct=np.array([True, False]),
        position_logp=np.full((G, STEPS), -0.5, np.float32),
    )


def changed(array: np.ndarray | None, index: Any, value: Any) -> np.ndarray:
    assert array is not None
    copy = array.copy()
    copy[index] = value
    return copy


def put(name: str, index: Any, value: Any):
    return lambda g: {name: changed(getattr(g, name), index, value)}


def cast(name: str, dtype: Any):
    return lambda g: {name: getattr(g, name).astype(dtype)}


def cut(name: str):
    return lambda g: {name: getattr(g, name)[:-1]}


# What is changed in a valid group, and what the error must say.
BREAKAGES = {
    **{
        f"{name} is too short": (cut(name), rf"{name} has shape")
        for name in ("unmask_step", "unmask_rank", "drawn", "logp", "logp_raw", "entropy", "correct", "nfe", "rewards")
    },
    "completions have lost a row": (cut("completion_ids"), "unmask_step has shape"),
    "position_logp is too short": (cut("position_logp"), "position_logp has shape"),
    "int64 tokens": (cast("completion_ids", np.int64), "completion_ids has dtype int64, expected int32"),
    "int32 steps": (cast("unmask_step", np.int32), "unmask_step has dtype int32, expected int16"),
    "drawn as numbers": (cast("drawn", np.uint8), "drawn has dtype uint8, expected bool"),
    "float64 log-probs": (cast("logp", np.float64), "logp has dtype float64, expected float32"),
    "float64 rewards": (cast("rewards", np.float64), "rewards has dtype float64"),
    "verdicts as numbers": (cast("correct", np.float32), "correct has dtype float32"),
    "a reward without a name": (lambda g: {"reward_names": ("shape",)}, r"rewards has shape \(2, 2\), expected"),
    "int64 prompt": (cast("prompt_ids", np.int64), "prompt_ids is not"),
    "prompt per row": (lambda g: {"prompt_ids": np.stack([g.prompt_ids] * G)}, "prompt_ids is not"),
    "other length than planned": (
        lambda g: {"sampler": dataclasses.replace(g.sampler, completion_length=8)},
        "4 positions, sampler says 8",
    ),
    "a step too late": (put("unmask_step", (0, 2), STEPS), r"unmask_step outside 0\.\.1"),
    "a step before the first": (put("unmask_step", (0, 2), -1), r"unmask_step outside"),
    "logp is nan": (put("logp", (0, 0), np.nan), "logp is not finite"),
    "logp is -inf": (put("logp", (0, 0), -np.inf), "logp is not finite"),
    "logp_raw is nan": (put("logp_raw", (0, 0), np.nan), "logp_raw is not finite"),
    "entropy is inf": (put("entropy", (0, 0), np.inf), "entropy is not finite"),
    "a filler with a log-prob": (put("logp", (1, 3), -0.1), "logp is not 0 at filled positions"),
    "a filler with a raw log-prob": (put("logp_raw", (1, 3), -0.1), "logp_raw is not 0 at filled"),
    "a filler with an entropy": (put("entropy", (1, 3), 0.1), "entropy is not 0 at filled"),
    "a probability above 1": (put("logp", (0, 1), 0.01), "logp above 0"),
    "no support": (lambda g: {"support_indptr": None, "support_ids": None}, "truncates but no support was recorded"),
    "half a support": (lambda g: {"support_ids": None}, "truncates but no support was recorded"),
    "support of fewer positions": (cut("support_indptr"), "support_indptr is not"),
    "int32 row pointers": (cast("support_indptr", np.int32), "support_indptr is not"),
    "int64 support": (cast("support_ids", np.int64), "support_ids is not"),
    "support cut off": (cut("support_ids"), "support_ids is not"),
    "support that begins late": (
        lambda g: {"support_indptr": changed(g.support_indptr, 0, 1)},
        "support_indptr doesn't begin at 0",
    ),
    "a drawn position without support": (put("support_indptr", 1, 0), "support and drawn disagree"),
    "a filler with support": (put("support_indptr", 7, 8), "support and drawn disagree"),
    "row pointers that fall": (put("support_indptr", 2, 0), "support and drawn disagree"),
    "a token outside its support": (put("support_ids", 3, 5), "outside its own support"),
    "a token twice in its support": (put("support_ids", 2, 2), "outside its own support"),
    "another token than was drawn": (put("completion_ids", (0, 0), 2), "outside its own support"),
}


def test_a_valid_group_passes(group):
    group.validate()
    assert group.size == G
    assert group.support(0, 1).tolist() == [2, 7] and group.support(1, 3).tolist() == []
    assert group.nbytes > group.logp.nbytes


@pytest.mark.parametrize(("change", "message"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_validate_names_what_is_broken(group, change, message):
    with pytest.raises(TrajectoryError, match=message) as caught:
        dataclasses.replace(group, **change(group)).validate()
    assert "group 41 from actor rollout-3" in str(caught.value)


def test_without_truncation_there_is_no_support(group):
    plain = dataclasses.replace(
        group, sampler=SamplerSpec(C, 2, STEPS, "random", 0.7), support_indptr=None, support_ids=None
    )
    plain.validate()
    assert plain.support(0, 0) is None
    assert not SamplerSpec(C, 2, STEPS, "random", 0.0, top_k=2).truncates, "greedy decoding needs no support"


def assert_same(a: TrajectoryGroup, b: TrajectoryGroup) -> None:
    for field in dataclasses.fields(TrajectoryGroup):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, field.name
            assert ours.tobytes() == theirs.tobytes(), field.name
        else:
            assert ours == theirs and type(ours) is type(theirs), field.name


def test_a_saved_group_comes_back_bit_for_bit(group, tmp_path):
    group.save(tmp_path / "group.safetensors")
    back = TrajectoryGroup.load(tmp_path / "group.safetensors")
    back.validate()
    assert_same(group, back)


def test_a_group_without_support_comes_back_too(tmp_path):
    plain = make_group([[1, 2]], [[0, 1]], steps=2, rewards=np.zeros((1, 0)))
    plain.save(tmp_path / "plain")
    back = TrajectoryGroup.load(tmp_path / "plain")
    assert_same(plain, back)
    assert back.support_ids is None and back.position_logp is None and back.reward_names == ()


def test_strided_arrays_are_saved_as_what_they_hold(group, tmp_path):
    """safetensors writes an array's memory, which in a transposed view is another order."""
    strided = dataclasses.replace(group, logp_raw=np.asfortranarray(group.logp_raw), entropy=group.entropy[:, ::-1])
    assert not strided.logp_raw.flags.c_contiguous
    strided.save(tmp_path / "group")
    assert_same(
        dataclasses.replace(group, entropy=group.entropy[:, ::-1].copy()), TrajectoryGroup.load(tmp_path / "group")
    )


def test_damaged_files_are_refused(group, tmp_path):
    path = tmp_path / "group"
    group.save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], np.random.default_rng(0).bytes(len(whole))):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a readable trajectory group"):
            TrajectoryGroup.load(path)
    with pytest.raises(DataError, match="nowhere"):
        TrajectoryGroup.load(tmp_path / "nowhere")


def test_a_flipped_bit_in_the_header_never_ends_in_another_error(group, tmp_path):
    """A header may still be readable afterwards (another number); otherwise it's the one error that callers expect."""
    path = tmp_path / "group"
    group.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for place in range(0, header, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            TrajectoryGroup.load(path)
        except DataError:
            refused += 1
    assert refused > header / 6


def rewritten(path: Path, group: TrajectoryGroup, edit) -> Path:
    """The group's file with its JSON header edited."""
    from safetensors import safe_open

    group.save(path)
    with safe_open(path, framework="numpy") as file:
        meta = json.loads(file.metadata()["group"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    edit(meta, arrays)
    save_file(arrays, path, metadata={"group": json.dumps(meta)})
    return path


def test_another_schema_version_is_refused_by_number(group, tmp_path):
    path = rewritten(tmp_path / "group", group, lambda meta, _: meta.update(schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(DataError, match=f"schema {SCHEMA_VERSION + 1}, this version reads {SCHEMA_VERSION}"):
        TrajectoryGroup.load(path)


def test_a_file_of_an_older_version_with_timings_is_read(group, tmp_path):
    path = rewritten(tmp_path / "group", group, lambda meta, _: meta.update(timings={"lease_generate_s": 0.25}))
    assert_same(group, TrajectoryGroup.load(path))


@pytest.mark.parametrize(
    "edit",
    [
        lambda meta, arrays: arrays.pop("logp"),
        lambda meta, arrays: meta.pop("sampler"),
        lambda meta, arrays: meta["sampler"].update(colour="red"),
        lambda meta, arrays: meta.update(reward_names=None),
        lambda meta, arrays: arrays.update(colour=np.zeros(1)),
    ],
    ids=["array missing", "sampler missing", "unknown sampler field", "no reward names", "unknown array"],
)
def test_whole_files_with_other_contents_are_refused(group, tmp_path, edit):
    with pytest.raises(DataError, match="not a readable trajectory group"):
        TrajectoryGroup.load(rewritten(tmp_path / "group", group, edit))


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(tmp_path):
    sprung = tmp_path / "sprung"
    path = tmp_path / "group"
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(DataError):
        TrajectoryGroup.load(path)
    assert not sprung.exists()
    pickle.loads(path.read_bytes())
    assert sprung.exists(), "control: the trap works"
