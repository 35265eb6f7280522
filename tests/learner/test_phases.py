"""Phases on real ranks: the teacher stays, the running mean is what the updates made, and a phase's end begins anew,
whatever the ZeRO stage."""

from collections.abc import Iterator

import pytest
import ray
import torch

from rollout.adapters import AdapterState, digest, unpack
from rollout.trajectory import TrajectoryGroup
from tests.support.learner_ranks import (
    ProbedGroup,
    adamw_steps,
    draw_batch,
    flat,
    importing_ray,
    probed_groups,
    put,
    random_adapter,
    relative,
    settings,
)

pytestmark = pytest.mark.slow

LR = 1e-2
LAYOUTS = [(1, 0, "float32"), (2, 0, "float32"), (2, 1, "float32"), (2, 2, "float32"), (2, 3, "float32")]
LAYOUTS += [(2, 2, "bfloat16"), (1, 3, "bfloat16")]


def dtm(ranks: int, stage: int, dtype: str, **changes):
    layout = {"learner__ranks": ranks, "learner__zero_stage": stage, "learner__dtype": dtype}
    return settings(objective__type="dtm", objective__tilt_step=1.0, **layout, **changes)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with importing_ray(cpus=4):
        yield


@pytest.fixture(scope="module")
def groups(cluster, tiny_model) -> Iterator[dict[int, ProbedGroup]]:
    with probed_groups(tiny_model) as started:
        yield started


@pytest.fixture(scope="module")
def batch(tiny_model) -> list[TrajectoryGroup]:
    config = settings()
    return draw_batch(tiny_model, config, random_adapter(tiny_model, config))


@pytest.fixture(scope="module")
def refs(cluster, batch) -> list[ray.ObjectRef]:
    return put(batch)


def started(groups, tiny_model, ranks: int, stage: int, dtype: str, **changes) -> tuple[ProbedGroup, AdapterState]:
    config = dtm(ranks, stage, dtype, **changes)
    adapter = random_adapter(tiny_model, config)
    return groups[ranks].restart(config, adapter), adapter


@pytest.mark.parametrize(("ranks", "stage", "dtype"), LAYOUTS)
def test_a_phase(groups, tiny_model, refs, ranks, stage, dtype):
    group, begun = started(groups, tiny_model, ranks, stage, dtype, objective__ema=0.5)
    mean = flat(begun)
    for index in range(3):
        assert group.update(refs, index, LR).applied
        mean = 0.5 * mean + 0.5 * flat(group.publish().state)
    last = group.publish().state
    state = group.phase_state()
    assert digest(state["teacher"]) == digest(begun), "the teacher is what the phase began with"
    exact = 1e-6 if dtype == "float32" else 0.01
    assert float((flat(state["mean"]) - mean).norm() / mean.norm()) < exact
    assert relative(begun, last) > 0.01 and relative(last, state["mean"]) > 0.001, "control: they differ"
    assert adamw_steps(group) == {3}

    group.enter_phase(1)
    ended, after = group.publish().state, group.phase_state()
    rounded = {name: unpack(tensor).to(unpack(ended[name]).dtype) for name, tensor in state["mean"].items()}
    assert all(torch.equal(rounded[name], unpack(ended[name])) for name in ended), "the policy is the mean"
    assert digest(after["teacher"]) == digest(ended)
    assert float((flat(after["mean"]) - flat(state["mean"])).norm()) <= (0 if dtype == "float32" else 1e-2)
    assert adamw_steps(group) == {0}
    assert group.update(refs, 0, LR).applied and adamw_steps(group) == {1}
    assert relative(ended, group.publish().state) > 0.001, "it goes on from there"
    step = (flat(group.publish().state) - flat(ended)).abs().max()
    assert step < 1.1 * LR, "not back to where the optimizer was"


def test_without_a_mean_a_phase_ends_with_the_last_weights(groups, tiny_model, refs):
    group, begun = started(groups, tiny_model, 1, 0, "float32")
    assert group.update(refs, 0, LR).applied
    last = group.publish().digest
    group.enter_phase(1)
    state = group.phase_state()
    assert list(state) == ["teacher"] and digest(state["teacher"]) == group.publish().digest == last != digest(begun)
    assert adamw_steps(group) == {0}


def test_layouts_agree_over_the_end_of_a_phase(groups, tiny_model, refs):
    through = {}
    for layout in LAYOUTS[:5]:
        group, _ = started(groups, tiny_model, *layout, objective__ema=0.5)
        losses = []
        for phase in range(2):
            if phase:
                group.enter_phase(phase)
            losses += [group.update(refs, index, LR).loss for index in range(2)]
        through[layout] = losses
    for losses in through.values():
        assert losses == pytest.approx(through[LAYOUTS[0]], rel=1e-4)


def test_a_phase_that_is_taken_up_goes_on_bit_for_bit(groups, tiny_model, refs):
    config = dtm(1, 0, "float32", objective__ema=0.9)
    group, _ = started(groups, tiny_model, 1, 0, "float32", objective__ema=0.9)
    group.update(refs, 0, LR)
    saved, shards, phase = group.publish().state, group.export(), group.phase_state()
    losses = [group.update(refs, index, LR).loss for index in (1, 2)]
    through = digest(group.phase_state()["mean"])

    def again(state) -> tuple[list[float], str]:
        group.restart(config, saved, shards)
        if state is not None:
            group.enter_phase(0, state)
        found = [group.update(refs, index, LR).loss for index in (1, 2)]
        return found, digest(group.phase_state()["mean"])

    assert again(phase) == (losses, through)
    other = again(None)
    assert other[0] != losses and other[1] != through, "control: the teacher and mean of the middle are others"


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[5]])
def test_a_phase_that_is_taken_up_at_its_begin_goes_on_bit_for_bit(groups, tiny_model, refs, layout):
    config = dtm(*layout, objective__ema=0.9)
    group, _ = started(groups, tiny_model, *layout, objective__ema=0.9)
    group.update(refs, 0, LR)
    group.enter_phase(1)
    saved, shards, phase = group.publish().state, group.export(), group.phase_state()
    losses = [group.update(refs, index, LR).loss for index in (0, 1)]
    through = digest(group.phase_state()["mean"]), digest(group.publish().state)
    group.restart(config, saved, shards)
    group.enter_phase(1, phase)
    assert [group.update(refs, index, LR).loss for index in (0, 1)] == losses
    assert (digest(group.phase_state()["mean"]), digest(group.publish().state)) == through
