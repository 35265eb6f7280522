"""The learner group on a real Ray with real DeepSpeed: the same gradient on any layout, one optimizer step per update,
nothing wasted on rows without signal, and steps that are skipped where they must be.

The bound of 1e-6 between layouts is near what float32 can give: the rounding of the forwards and backwards alone puts
any layout's gradient 3e-7 to 9e-7 from the one computed in float64, and two layouts 2e-7 to 6e-7 from each other
(measured on five batches; adding up in float64 changes nothing).
"""

import dataclasses
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import ray
import torch

from learner.ranks.group import RanksLost
from learner.ranks.rank import PublishedAdapter
from learner.supply.publish import publish
from rewards.errors import CheckpointError, TrajectoryError, WaitTimeout, WeightMismatch
from rollout.adapters import AdapterState, digest, unpack
from rollout.engines.torch import TorchEngine
from rollout.messages import GroupRef
from rollout.trajectory import SamplerSpec, TrajectoryGroup
from rollout.waits import bounded_get
from tests.support.learner_ranks import (
    SAMPLER,
    ProbedGroup,
    adamw_steps,
    draw_batch,
    flat,
    fresh_adapter,
    importing_ray,
    lora_spec,
    plain_gradient,
    probed_groups,
    put,
    random_adapter,
    relative,
    settings,
)

pytestmark = pytest.mark.slow

LAYOUTS = [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2), (2, 3)]  # (ranks, ZeRO stage)
VIEWS_PER_FORWARD = (1, 8, 16)
COMPLETIONS, K, LR, CLIP = 16, 4, 1e-3, 0.5


class Trained(NamedTuple):
    """What a layout made of the recorded batch."""

    gradients: dict[int, AdapterState]
    """by views_per_forward"""
    after_three: AdapterState
    """the adapter after three updates"""
    without_gradient_calls: str
    """digest of the same adapter when ``gradient`` was never called"""


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with importing_ray(cpus=4):
        yield


@pytest.fixture(scope="module")
def groups(cluster, tiny_model) -> Iterator[dict[int, ProbedGroup]]:
    """Processes by number of ranks; each test restarts what is in them."""
    with probed_groups(tiny_model) as started:
        yield started


@pytest.fixture(scope="module")
def adapter(tiny_model) -> AdapterState:
    return random_adapter(tiny_model, settings())


@pytest.fixture(scope="module")
def batch(tiny_model, adapter) -> list[TrajectoryGroup]:
    return draw_batch(tiny_model, settings(), adapter)


@pytest.fixture(scope="module")
def refs(cluster, batch) -> list[GroupRef]:
    return put(batch)


@pytest.fixture(scope="module")
def trained(groups, adapter, refs) -> dict[tuple[int, int], Trained]:
    return {layout: train(groups[layout[0]], layout, adapter, refs) for layout in LAYOUTS}


def at(ranks: int, stage: int = 0, **changes):
    return settings(learner__ranks=ranks, learner__zero_stage=stage, **changes)


def train(group: ProbedGroup, layout: tuple[int, int], adapter: AdapterState, refs) -> Trained:
    group.restart(at(*layout), adapter)
    gradients = {}
    for views in VIEWS_PER_FORWARD if layout[1] == 0 else VIEWS_PER_FORWARD[1:]:
        group.reconfigure(at(*layout, learner__views_per_forward=views))
        gradients[views] = group.gradient(refs, 0)
    assert digest(group.gradient(refs, 0)) == digest(gradients[16]), "a second call found something left over"
    published = []
    for _ in range(2):
        for index in range(3):
            assert group.update(refs, index, LR).applied
        published.append(group.publish())
        group.restart(at(*layout), adapter)
    return Trained(gradients, published[0].state, published[1].digest)


def without_signal(batch: list[TrajectoryGroup]) -> list[TrajectoryGroup]:
    return [dataclasses.replace(group, rewards=np.ones_like(group.rewards)) for group in batch]


# ---- the same numbers on any layout


@pytest.mark.parametrize("views", VIEWS_PER_FORWARD)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_do_not_depend_on_ranks_and_micro_batches(trained, ranks, views):
    expected, gradient = trained[1, 0].gradients[16], trained[ranks, 0].gradients[views]
    error = relative(expected, gradient)
    print(f"{ranks} ranks, {views} views per forward: relative L2 {error:.1e}")
    assert error <= 1e-6


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_gradients_do_not_depend_on_the_zero_stage(trained, ranks, stage):
    errors = [relative(trained[1, 0].gradients[16], gradient) for gradient in trained[ranks, stage].gradients.values()]
    print(f"{ranks} ranks, stage {stage}: relative L2 {max(errors):.1e}")
    assert max(errors) <= 1e-4


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_adapters_after_three_updates_agree(trained, adapter, ranks, stage):
    expected, ours = trained[1, 0].after_three, trained[ranks, stage].after_three
    moved = float((flat(expected) - flat(adapter)).norm())
    of_change = float((flat(expected) - flat(ours)).norm()) / moved
    print(f"{ranks} ranks, stage {stage}: {relative(expected, ours):.1e}, of the change {of_change:.1e}")
    assert moved > 0.01
    assert relative(expected, ours) <= 1e-4
    assert of_change <= 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_asking_for_the_gradient_leaves_no_trace(trained, layout):
    assert digest(trained[layout].after_three) == trained[layout].without_gradient_calls


def test_the_gradient_is_that_of_plain_autograd(trained, tiny_model, batch, adapter):
    expected = plain_gradient(tiny_model, settings(), adapter, batch, normaliser=COMPLETIONS * K)
    error = relative(expected, trained[2, 2].gradients[8])
    print(f"relative L2 {error:.1e}")
    assert error <= 1e-6
    live_only = plain_gradient(tiny_model, settings(), adapter, batch, normaliser=12 * K)
    assert relative(live_only, trained[2, 2].gradients[8]) > 0.1, "control: rows without signal count"


def test_control_the_published_normaliser_depends_on_the_layout(groups, adapter, refs):
    gradients = {}
    for ranks in (1, 2):
        groups[ranks].restart(at(ranks), adapter)
        for views in VIEWS_PER_FORWARD:
            groups[ranks].reconfigure(at(ranks, learner__views_per_forward=views))
            gradients[ranks, views] = groups[ranks].ask("gradient_as_published", refs)[0]
    expected = gradients.pop((1, 16))
    errors = {layout: relative(expected, gradient) for layout, gradient in gradients.items()}
    print({layout: f"{error:.1e}" for layout, error in errors.items()})
    assert min(errors.values()) > 1e-3


def test_activation_checkpointing_gives_the_same_gradient(groups, trained, adapter, refs):
    plain = groups[1].restart(at(1), adapter)
    plain.gradient(refs, 0)
    without = plain.ask("counted")[0]
    group = groups[1].restart(at(1, learner__activation_checkpointing="true"), adapter)
    error = relative(trained[1, 0].gradients[16], group.gradient(refs, 0))
    counts = group.ask("counted")[0]
    assert counts["block_runs"] == 2 * without["block_runs"], "every block is run again in the backward"
    print(f"relative L2 {error:.1e}")
    assert error <= 1e-6


# ---- one optimizer step


def plain_adamw(adapter: AdapterState, gradients: list[AdapterState], **options) -> torch.Tensor:
    """Weights after torch's clipping and AdamW took one step for each gradient."""
    names = sorted(adapter)
    parameters = [torch.nn.Parameter(unpack(adapter[name])) for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.99), eps=1e-8, **{"weight_decay": 0.0, **options})
    for gradient in gradients:
        for parameter, name in zip(parameters, names, strict=True):
            parameter.grad = unpack(gradient[name])
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    return torch.cat([p.detach().flatten().double() for p in parameters])


def zeros(state: AdapterState) -> AdapterState:
    return {name: dataclasses.replace(t, data=np.zeros_like(t.data)) for name, t in state.items()}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 2), (1, 3)])
def test_an_update_is_one_optimizer_step_however_many_backwards(groups, adapter, refs, ranks, stage):
    config = at(ranks, stage, learner__views_per_forward=4, learner__max_grad_norm=CLIP)
    group = groups[ranks].restart(config, adapter)
    gradient = group.gradient(refs, 0)
    group.ask("counted")
    report = group.update(refs, 0, LR)
    assert report.grad_norm == pytest.approx(float(flat(gradient).norm()), rel=1e-5) and report.grad_norm > CLIP
    backwards = [counts["policy_forwards"] for counts in group.ask("counted")]
    assert min(backwards) > 3 and sum(backwards) == report.forwards
    assert len(set(backwards)) == 1, "ranks do equal numbers of passes"
    assert report.applied and adamw_steps(group) == {1}
    error = (flat(group.publish().state) - plain_adamw(adapter, [gradient])).abs().max()
    assert error <= 1e-7

    group.restart(config, adapter)
    steps = group.ask("step_after_every_backward", refs, LR)[0]
    assert adamw_steps(group) == {steps} != {1}, "control: the reference takes a step per backward"
    error = (flat(group.publish().state) - plain_adamw(adapter, [gradient])).abs().max()
    assert error > LR, "control: and its weights move accordingly further"


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_a_batch_without_signal_is_a_step_with_zero_gradients(groups, adapter, batch, refs, ranks, stage):
    group = groups[ranks].restart(at(ranks, stage, learner__weight_decay=0.1, learner__max_grad_norm=CLIP), adapter)
    gradient = group.gradient(refs, 0)
    assert group.update(refs, 0, LR).applied
    group.ask("counted")
    report = group.update(put(without_signal(batch)), 0, LR)
    assert [counts["policy_rows"] for counts in group.ask("counted")] == [1] * ranks, "one pad keeps ranks in step"
    assert report.applied and report.grad_norm == 0.0 and report.loss == 0.0
    assert report.plan_statistics["groups/no_signal_share"] == 1.0
    assert "scored_tokens" not in report.statistics.values()
    assert adamw_steps(group) == {2}
    ours = flat(group.publish().state)
    expected = plain_adamw(adapter, [gradient, zeros(gradient)], weight_decay=0.1)
    assert (ours - expected).abs().max() <= 1e-7
    skipped = plain_adamw(adapter, [gradient], weight_decay=0.1)
    assert (ours - skipped).abs().max() > 1e-4, "control: momentum and decay did act"


def test_ranks_hold_the_same_weights_at_stage_0(groups, adapter, refs):
    group = groups[2].restart(at(2), adapter)
    group.update(refs, 0, LR)
    first, second = group.export()
    assert first == second


# ---- gradients that are not finite


def spoiled(batch: list[TrajectoryGroup], how: str) -> list[TrajectoryGroup]:
    """A batch, valid by its contract, whose gradient overflows."""
    first = batch[0]
    if how.endswith("reward"):
        # Finite, but an advantage of 4e38 is more than float32 holds; and so is the square of a gradient of 1e25.
        rewards = first.rewards.copy()
        rewards[0] = 3e38 if how == "huge reward" else 1e26
        spoilt = dataclasses.replace(first, rewards=rewards)
    else:  # a token with a negative advantage that the rollout calls all but impossible: the ratio overflows
        logp = first.logp.copy()
        logp[first.rewards.sum(axis=1).argmin()] = -1e9
        spoilt = dataclasses.replace(first, logp=logp)
    spoilt.validate()
    return [spoilt, *batch[1:]]


@pytest.mark.parametrize(
    ("ranks", "stage", "how"),
    [
        (ranks, stage, how)
        for ranks, stage in [(1, 0), (2, 0), (1, 2), (2, 2), (1, 3)]
        for how in ["huge reward", "large reward", "impossible token"]
        if (stage, how) != (3, "large reward")  # stage 3 adds norms up in a way that doesn't overflow there
    ],
)
def test_a_gradient_that_is_not_finite_skips_the_step(groups, adapter, batch, refs, ranks, stage, how):
    group = groups[ranks].restart(at(ranks, stage), adapter)
    group.update(refs, 0, LR)
    weights, shards = group.publish().digest, group.export()
    report = group.update(put(spoiled(batch, how)), 1, LR)
    assert not report.applied and not np.isfinite(report.grad_norm)
    assert np.isfinite(report.loss) == (how == "large reward"), "the gradient's norm alone overflows there"
    assert group.publish().digest == weights and group.export() == shards, "weights and moments are as they were"
    assert adamw_steps(group) == {1}
    after = group.update(refs, 1, LR)
    assert after.applied and np.isfinite(after.grad_norm) and adamw_steps(group) == {2}
    assert group.publish().digest != weights, "control: a good batch moves them"


# ---- which rows cost what


def test_rows_without_signal_cost_no_forward(groups, adapter, batch, refs):
    group = groups[1].restart(at(1), adapter)
    report = group.update(refs, 0, LR)
    (counts,) = group.ask("counted")
    figures = report.plan_statistics
    assert figures["live_completions"] == 12 and figures["completions"] == COMPLETIONS
    assert counts["policy_rows"] == figures["views"] == 12 * K - figures["draws_merged"]
    assert counts["policy_forwards"] == report.forwards == np.ceil(figures["views"] / 16)
    assert "reference_forwards" not in counts
    assert counts["whole_groups"] == 3, "supports of the group without signal are not fetched"


def test_each_rank_fetches_the_supports_of_its_own_share(groups, adapter, refs):
    pair = groups[2].restart(at(2), adapter)
    pair.update(refs, 0, LR)
    assert [counts["whole_groups"] for counts in pair.ask("counted")] == [2, 2], "a group lies in both shares"
    raw = settings(objective__type="diffu_grpo", learner__ranks=2)
    pair.restart(raw, adapter).update(refs, 0, LR)
    assert [counts["whole_groups"] for counts in pair.ask("counted")] == [0, 0], "an untruncated law needs none"


def test_the_kl_wants_every_row_and_the_reference(groups, refs):
    """On a fresh adapter, which acts as the reference itself, the KL is 0; a step moves it."""
    group = groups[1].restart(at(1, objective__beta=0.1), None)
    report = group.update(refs, 0, LR)
    (counts,) = group.ask("counted")
    assert report.plan_statistics["live_completions"] == COMPLETIONS
    assert counts["reference_forwards"] == counts["policy_forwards"] == report.forwards
    assert counts["reference_rows"] == counts["policy_rows"] == report.plan_statistics["views"] > 12 * K * 0.7
    assert report.statistics.values()["kl"] == 0.0
    assert group.update(refs, 1, LR).statistics.values()["kl"] > 1e-7


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])
def test_the_gradient_with_a_kl_term_is_that_of_plain_autograd(
    groups, trained, tiny_model, adapter, batch, refs, ranks, stage
):
    config = at(ranks, stage, objective__beta=1.0)
    gradient = groups[ranks].restart(config, adapter).gradient(refs, 0)
    expected = plain_gradient(tiny_model, config, adapter, batch, normaliser=COMPLETIONS * K)
    print(f"{ranks} ranks, stage {stage}: relative L2 {relative(expected, gradient):.1e}")
    assert relative(expected, gradient) <= (1e-6 if stage == 0 else 1e-4)
    assert relative(expected, trained[1, 0].gradients[16]) > 1e-3, "control: the KL term matters"


def all_eos(group: TrajectoryGroup, eos: int) -> TrajectoryGroup:
    """The group with row 0 as it comes out when the first block is drawn to be EOS: the rest is filled."""
    block, steps = group.sampler.block_length, group.sampler.steps
    drawn, step = group.drawn.copy(), group.unmask_step.copy()
    ids = group.completion_ids.copy()
    ids[0], drawn[0, block:] = eos, False
    step[0, block:] = steps // 2
    zeroed = {name: np.where(drawn, getattr(group, name), 0).astype(np.float32) for name in ("logp_raw", "entropy")}
    logp = np.where(drawn, group.logp, 0).astype(np.float32)
    edited = dataclasses.replace(group, completion_ids=ids, drawn=drawn, unmask_step=step, logp=logp, **zeroed)
    edited.validate()
    return edited


@pytest.mark.parametrize("step_range", ["all", "until_last_token"])
def test_a_completion_of_eos_only_is_trained_on_and_stays_in_the_denominator(groups, tiny_model, adapter, step_range):
    whole = SamplerSpec(24, 12, 8, "random", temperature=0.8)
    batch = draw_batch(tiny_model, settings(), adapter, whole)
    batch[0] = all_eos(batch[0], eos=0)
    config = at(1, objective__step_range=step_range)
    group = groups[1].restart(config, adapter)
    refs = put(batch)
    gradient = group.gradient(refs, 0)
    expected = plain_gradient(tiny_model, config, adapter, batch, normaliser=COMPLETIONS * K)
    assert relative(expected, gradient) <= 1e-6
    fewer = plain_gradient(tiny_model, config, adapter, batch, normaliser=(COMPLETIONS - 1) * K)
    assert relative(fewer, gradient) > 0.01, "control: without it the step is larger"
    report = group.update(refs, 0, LR)
    assert report.applied
    assert report.plan_statistics["all_eos_completions"] == 1
    assert report.plan_statistics["completions"] == COMPLETIONS


def test_choices_of_positions_give_the_same_gradient_on_any_layout(groups, tiny_model, adapter):
    decoupled = dataclasses.replace(SAMPLER, position_rule="decoupled_confidence", position_temperature=0.1)
    batch = draw_batch(tiny_model, settings(), adapter, decoupled)
    changes = {"objective__beta": 0.05}
    whole = {"normaliser": COMPLETIONS * K}
    expected = plain_gradient(tiny_model, at(1, **changes), adapter, batch, **whole)
    refs = put(batch)
    for ranks in (1, 2):
        group = groups[ranks].restart(at(ranks, **changes), adapter)
        error = relative(expected, group.gradient(refs, 0))
        print(f"{ranks} ranks: relative L2 {error:.1e}")
        assert error <= 5e-6, "1 / tau magnifies the rounding of the logits"
    figures = group.update(refs, 0, LR).statistics.values()
    assert figures["scored_choices"] > 0 and figures["log_ratio/abs_max"] <= 1e-4
    tokens_only = [dataclasses.replace(group, position_logp=None, position_entropy=None) for group in batch]
    other = plain_gradient(tiny_model, at(1, **changes), adapter, tokens_only, **whole)
    assert relative(expected, other) > 0.01, "control: the choices count"


# ---- on the policy, and off it


def test_a_second_update_on_the_same_batch_is_off_the_policy(groups, adapter, refs):
    group = groups[1].restart(at(1), adapter)
    first = group.update(refs, 0, LR).statistics.values()
    second = group.update(refs, 1, LR).statistics.values()
    assert first["log_ratio/abs_max"] <= 1e-5 and first["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    assert second["log_ratio/abs_max"] > 1e-3 and second["ratio/max"] > 1.001


def test_what_is_published_is_what_an_engine_loads(groups, tiny_model, adapter, refs):
    group = groups[2].restart(at(2, 3), adapter)
    group.update(refs, 0, LR)
    published = group.publish()
    weights = publish(1, published)
    engine = TorchEngine(model_path=tiny_model, lora=lora_spec(settings()), max_rows=4, threads=1)
    state = bounded_get(weights.refs[0], who="the adapter", timeout_s=30)
    engine.load_adapter(weights.version, state, weights.digest)
    assert (engine.policy_version, engine.adapter_digest) == (1, published.digest)
    assert published.digest != digest(adapter)
    with pytest.raises(WeightMismatch, match="adapter version 2 was published with digest"):
        engine.load_adapter(2, adapter, published.digest)
    with pytest.raises(WeightMismatch, match="adapter version 2 left rank 0 with digest"):
        publish(2, PublishedAdapter(adapter, published.digest, published.peft_config))


def test_a_new_group_starts_from_a_fresh_adapter_or_the_given_one(groups, tiny_model, adapter):
    for stage in (0, 3):
        assert groups[2].restart(at(2, stage)).publish().digest == digest(fresh_adapter(tiny_model, settings()))
        assert groups[2].restart(at(2, stage), adapter).publish().digest == digest(adapter)
    assert groups[2].publish().peft_config["r"] == 4


# ---- what is refused


def test_greedy_trajectories_are_refused(groups, tiny_model, adapter, batch, refs):
    greedy = dataclasses.replace(SAMPLER, temperature=0.0, position_rule="low_confidence")
    decoded = draw_batch(tiny_model, settings(), adapter, greedy)
    group = groups[1].restart(at(1), adapter)
    with pytest.raises(TrajectoryError, match="temperature 0"):
        group.update([*refs[:3], *put(decoded[3:])], 0, LR)
    assert adamw_steps(group) == {0}
    assert group.update(refs, 0, LR).applied


def test_trajectories_of_threshold_decoding_are_refused(groups, tiny_model, adapter):
    decoded = draw_batch(tiny_model, settings(), adapter, dataclasses.replace(SAMPLER, threshold=0.9))
    group = groups[1].restart(at(1), adapter)
    with pytest.raises(TrajectoryError, match="confidence threshold"):
        group.update(put(decoded), 0, LR)


@pytest.mark.filterwarnings("ignore:.free. is a deprecated API")  # nothing else loses an object on one node
def test_a_group_that_is_gone_is_told_as_a_loss(groups, adapter, batch, refs):
    group = groups[1].restart(at(1), adapter)
    (gone,) = put(batch[3:])
    ray._private.internal_api.free([gone.whole])
    with pytest.raises(RanksLost, match="given or gave in 'update' is gone") as lost:
        group.update([*refs[:3], gone], 0, LR)
    assert lost.value.cause == "lost"
    assert group.update(refs, 0, LR).applied


class Told:
    """In a rank's place: what it does when it is asked."""

    def fail(self) -> None:
        raise RuntimeError("Connection closed by peer")

    def die(self, after_s: float) -> None:
        time.sleep(after_s)
        os._exit(1)

    def answer(self) -> int:
        return 7


def test_a_rank_that_misses_a_dead_one_is_no_fault_of_its_own(groups, adapter):
    """Its answer, that the exchange failed, may come before Ray has heard of the death."""
    group = groups[1].restart(at(1), adapter)
    first, second = (ray.remote(Told).options(num_cpus=0).remote() for _ in range(2))
    assert ray.get([first.answer.remote(), second.answer.remote()], timeout=120) == [7, 7]
    for other in ("answer", "fail"):  # controls: nobody is dead, so it is a fault, and told soon
        began = time.monotonic()
        with pytest.raises(ray.exceptions.RayTaskError, match="Connection closed by peer"):
            group._answers([first.fail.remote(), getattr(second, other).remote()], "update", 60.0)
        assert time.monotonic() - began < 9.0, "all have answered, so nobody is waited for"
    refs = [first.fail.remote(), second.die.remote(2.0)]
    with pytest.raises(RanksLost, match="learner rank 1 died during 'update'"):
        group._answers(refs, "update", 60.0)


def test_optimizer_state_of_another_layout_is_refused(groups, adapter, refs):
    groups[1].restart(at(1, 2), adapter).update(refs, 0, LR)
    shard = groups[1].export()[0]
    with pytest.raises(CheckpointError, match="doesn't fit this run's layout"):
        groups[2].restart(at(2, 2), adapter, [shard, shard])
    with pytest.raises(CheckpointError, match=r"the optimizer shard holds 1 tensors and this rank needs \d+"):
        groups[1].restart(at(1, 0), adapter, [shard])


def test_a_cluster_that_cannot_hold_the_ranks_is_named(groups, tiny_model):
    free = ray.available_resources()["CPU"]
    with pytest.raises(WaitTimeout, match=r"2 learner ranks 3 CPU each within 1 s .*free now: 1 CPU"):
        ProbedGroup(at(2, resources__cpus_per_rank=3, timeouts__start=1), tiny_model)
    assert ray.available_resources()["CPU"] == free
