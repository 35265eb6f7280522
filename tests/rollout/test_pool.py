"""Actors, pool and replay buffer on a real Ray with the real engine: deaths, hangs, late answers, lost objects."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.experimental.locations import get_local_object_locations

from learner.runs.local_ray import local_ray
from rewards.errors import ConfigError, WaitTimeout, WeightMismatch, WorkerLost
from rewards.task import Problem
from rollout.actor import ActorSettings, RolloutActor
from rollout.adapters import adapter_parameters, digest, pack
from rollout.code import code_identity
from rollout.engines.torch import TorchEngine
from rollout.events import ActorLost, Delivery
from rollout.ledger import STATUSES, Ledger
from rollout.messages import BASE_WEIGHTS, EvalResult, Weights
from rollout.models.encoding import completion_text, load_tokenizer
from rollout.models.lora import LoraSpec
from rollout.places import Resize
from rollout.pool import RolloutPool
from rollout.replay import ReplayBuffer, ReplayItem
from rollout.trajectory import (
    BranchSpec,
    DrawnBranches,
    GreedyBranches,
    GroupSpec,
    Lease,
    SamplerSpec,
    TrajectoryGroup,
)
from rollout.waits import bounded_get

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
LORA = LoraSpec(r=2, alpha=4.0)
# 24 completions of 256 tokens: a group is above the size (100 kB) up to which Ray ships values inside messages.
SAMPLER = SamplerSpec(256, 256, steps=4, position_rule="random", temperature=1.0)
SIZE = 24
GREEDY = SamplerSpec(16, 16, steps=4, position_rule="low_confidence", temperature=0.0)

# A user's task. Its grader waits while the file fields["gate"] exists, and says so in a file beside it, which lets a
# test stop an actor in the middle of a lease.
PATIENT = """
import os, time
from rewards.task import Grade, Task

class Patient(Task):
    name = "patient"
    components = ("digits", "letters")
    def problems(self, split, *, seed, size, path=None):
        return []
    def messages(self, fields):
        return [{"role": "user", "content": f"Puzzle: {fields['number']}"}]
    def validate_fields(self, fields):
        pass
    def grade(self, fields, completion):
        while os.path.exists(fields.get("gate", "")):
            open(fields["gate"] + ".reached", "w").close()
            time.sleep(0.02)
        digits = sum(c in "0123456789" for c in completion)
        letters = float("nan") if fields.get("broken") else float(sum(c.isalpha() for c in completion))
        return Grade(digits % 2 == 0, {"digits": float(digits), "letters": letters})
"""


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What another process needs of the environment to join."""
    tasks = tmp_path_factory.mktemp("tasks")
    (tasks / "patient_task.py").write_text(PATIENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tasks), str(REPOSITORY)]))
        with local_ray(num_cpus=6, logging_level=logging.ERROR) as joining:
            yield joining


def build_pool(model: str, size: int, *, settings: dict[str, Any] | None = None, **changes: Any) -> RolloutPool:
    defaults: dict[str, Any] = {
        "make_engine": functools.partial(TorchEngine, model_path=model, lora=LORA, max_rows=32, threads=1),
        "task": "patient_task:Patient",
        "graders": 1,
        "grade_timeout_s": 120.0,
        "pull_timeout_s": 30.0,
        "run_seed": 7,
        "code_digest": code_identity().digest,
    }
    options: dict[str, Any] = {"resources": {"CPU": 1}, "environment": {}, "start_timeout_s": 120.0, "max_restarts": 3}
    return RolloutPool(ActorSettings(**defaults | (settings or {})), size=size, **options | changes)


@pytest.fixture(scope="module")
def shared_pool(cluster: None, tiny_model: str) -> Iterator[RolloutPool]:
    pool = build_pool(tiny_model, 2)
    yield pool
    pool.close()


@pytest.fixture
def pool(shared_pool: RolloutPool) -> RolloutPool:
    """Two actors, ready and idle. Starting them is slow, so tests share them, replacements included."""
    shared_pool.wait_ready()
    shared_pool.poll(0.0)
    assert shared_pool.idle() == 2, "an earlier test left work behind"
    return shared_pool


@pytest.fixture
def make_pool(tiny_model: str) -> Iterator[Callable[..., RolloutPool]]:
    pools = []

    def make(size: int, **changes: Any) -> RolloutPool:
        pools.append(build_pool(tiny_model, size, **changes))
        pools[-1].wait_ready()
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture(scope="module")
def weights(cluster: None, tiny_model: str) -> Callable[[int], Weights]:
    """Published adapters that differ by version."""
    model = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=1).model
    shapes = {name: parameter.shape for name, parameter in adapter_parameters(model).items()}

    @functools.cache
    def publish(version: int) -> Weights:
        generator = torch.Generator().manual_seed(version)
        state = pack({name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()})
        return Weights(version, digest(state), [ray.put(state)])

    return publish


def plan(count: int = 4, first: int = 0, **fields: Any) -> list[GroupSpec]:
    """Groups; ``fields`` go to the first one's grader."""
    return [
        GroupSpec(i, Problem(f"p{i}", {"number": i} | (fields if i == first else {})), SIZE, seed=100 + i)
        for i in range(first, first + count)
    ]


def new_replay() -> ReplayBuffer:
    return ReplayBuffer(Ledger(capacity=8, groups_per_lease=2, max_staleness=1))


def pump(
    pool: RolloutPool,
    replay: ReplayBuffer,
    iteration: int,
    weights: Weights,
    *,
    sampler: SamplerSpec = SAMPLER,
    lease_timeout_s: float = 120.0,
    every_turn: Callable[[], None] = lambda: None,
) -> list[ActorLost]:
    """The controller's loop for one iteration, with conservation checked at every turn."""
    lost = []
    deadline = time.monotonic() + 120.0
    while not replay.ledger.complete(iteration):
        assert time.monotonic() < deadline, "the iteration does not get done"
        while pool.idle():
            lease = replay.ledger.lease(policy_version=weights.version, timeout_s=lease_timeout_s)
            if lease is None:
                break
            pool.submit(lease, sampler, weights)
        for event in pool.poll(0.1):
            if isinstance(event, Delivery):
                replay.deliver(event.report, event.refs)
            else:
                if isinstance(event, ActorLost):
                    lost.append(event)
                if event.lease_id is not None:
                    replay.ledger.fail_lease(event.lease_id)
        for lease_id in replay.ledger.expire():
            pool.kill_lease(lease_id)
        counts = replay.ledger.counts()
        assert counts["issued"] == sum(counts[status] for status in STATUSES)
        every_turn()
    return lost


def groups_of(items: list[ReplayItem]) -> list[TrajectoryGroup]:
    return [bounded_get(item.ref.whole, who=f"group {item.group_id}", timeout_s=30.0) for item in items]


def content(groups: list[TrajectoryGroup]) -> list[dict[str, Any]]:
    """All that must repeat bit for bit: everything but times, recoveries and who did it."""
    found = []
    for group in groups:
        fields = dataclasses.asdict(group)
        kept = {name: value for name, value in fields.items() if name not in ("counters", "actor_id")}
        found.append({n: v.tobytes() if isinstance(v, np.ndarray) else v for n, v in kept.items()})
    return found


def pids(pool: RolloutPool) -> dict[str, int]:
    return {worker["actor_id"]: worker["pid"] for worker in pool.workers()}


class AtGate:
    """Does something, once, to the actor that holds the first lease, while its grader waits at the gate."""

    def __init__(self, gate: Path, pool: RolloutPool, action: signal.Signals) -> None:
        self.gate, self.pool, self.action = gate, pool, action
        self.done = False
        gate.touch()

    def __call__(self) -> None:
        if not self.done and self.gate.with_name(self.gate.name + ".reached").exists():
            victim = min((w for w in self.pool.workers() if w["lease_id"] is not None), key=lambda w: w["lease_id"])
            os.kill(victim["pid"], self.action)
            self.gate.unlink()
            self.done = True


@pytest.fixture(scope="module")
def undisturbed(shared_pool: RolloutPool, weights: Callable[[int], Weights]) -> list[dict[str, Any]]:
    replay = new_replay()
    replay.ledger.issue(0, plan())
    shared_pool.wait_ready()
    assert pump(shared_pool, replay, 0, weights(0)) == []
    return content(groups_of(replay.take(0, 0)))


def test_an_iteration(pool: RolloutPool, weights: Callable[[int], Weights]) -> None:
    replay = new_replay()
    for version in range(2):
        replay.ledger.issue(version, plan(first=4 * version))
        pump(pool, replay, version, weights(version))
        items = replay.take(version, version)
        groups = groups_of(items)
        assert [group.group_id for group in groups] == [item.group_id for item in items]
        assert [item.group_id for item in items] == list(range(4 * version, 4 * version + 4))
        for item, group in zip(items, groups, strict=True):
            assert (item.policy_version, item.staleness) == (version, 0)
            assert (group.policy_version, group.adapter_digest) == weights(version)[:2]
            assert group.reward_names == ("digits", "letters") and group.rewards.shape == (SIZE, 2)
            assert (group.correct == (group.rewards[:, 0] % 2 == 0)).all()
            assert item.report.tokens == group.drawn.sum() and item.report.invalid is None
            assert group.actor_id in pids(pool)
        replay.commit(items, version)
    assert replay.ledger.counts()["consumed"] == 8
    assert {worker["policy_version"] for worker in pool.workers()} <= {0, 1}
    assert all(worker["state"] == "idle" and worker["host"] for worker in pool.workers())


def test_killed_actor_changes_nothing(
    pool: RolloutPool,
    weights: Callable[[int], Weights],
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """SIGKILL in the middle of a lease: it is leased again, the ledger balances, the same bits come out."""
    replay, before = new_replay(), pids(pool)
    killer = AtGate(tmp_path / "gate", pool, signal.SIGKILL)
    replay.ledger.issue(0, plan(gate=str(killer.gate)))
    lost = pump(pool, replay, 0, weights(0), every_turn=killer)
    assert killer.done and [event.lease_id for event in lost] == [0]
    assert "ActorDied" in lost[0].error
    counts = replay.ledger.counts()
    assert (counts["failed"], counts["relet"], counts["ready"]) == (1, 1, 4)
    assert content(groups_of(replay.take(0, 0))) == undisturbed
    pool.wait_ready()
    after = pids(pool)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [lost[0].actor_id]
    (worker,) = [worker for worker in pool.workers() if worker["actor_id"] == lost[0].actor_id]
    assert worker["restarts"] >= 1 and worker["last_error"] == lost[0].error


def test_other_weights_give_other_bits(
    pool: RolloutPool, weights: Callable[[int], Weights], undisturbed: list[dict[str, Any]]
) -> None:
    """The control of the test above: its comparison sees a difference, also in the tokens alone."""
    replay = new_replay()
    replay.ledger.issue(0, plan())
    pump(pool, replay, 0, weights(1))
    groups = content(groups_of(replay.take(0, 1)))
    tokens = [group["completion_ids"] for group in groups]
    assert all(ours != theirs["completion_ids"] for ours, theirs in zip(tokens, undisturbed, strict=True))


def test_hanging_actor_is_replaced(
    pool: RolloutPool,
    weights: Callable[[int], Weights],
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    replay = new_replay()
    stopper = AtGate(tmp_path / "gate", pool, signal.SIGSTOP)
    replay.ledger.issue(0, plan(gate=str(stopper.gate)))
    # Short while the actor is to be found stuck, and long enough for the repetition on a loaded machine.
    lost = pump(pool, replay, 0, weights(0), lease_timeout_s=8.0, every_turn=stopper)
    assert stopper.done
    assert lost[0].lease_id == 0 and "did not deliver lease 0 in time" in lost[0].error
    assert replay.ledger.counts()["expired"] >= 1
    assert content(groups_of(replay.take(0, 0))) == undisturbed


def test_second_delivery_is_refused(pool: RolloutPool, weights: Callable[[int], Weights]) -> None:
    replay = new_replay()
    replay.ledger.issue(0, plan(2))
    first = replay.ledger.lease(policy_version=0, timeout_s=60.0)
    second = replay.ledger.second_lease(after_s=0.0, policy_version=0, timeout_s=60.0)
    assert first is not None and second is not None
    for lease in (first, second):
        pool.submit(lease, SAMPLER, weights(0))
    accepted: list[list[int]] = []
    bits = []
    while len(accepted) < 2:
        for event in pool.poll(30.0):
            assert isinstance(event, Delivery)
            wholes = [ref.whole for ref in event.refs]
            bits.append(content(bounded_get(wholes, who="groups", timeout_s=30.0)))
            accepted.append(replay.deliver(event.report, event.refs))
    assert accepted == [[0, 1], []]
    assert bits[0] == bits[1], "drawn with the same weights, so whoever delivers first makes no difference"
    assert replay.ledger.counts()["refused"] == 1 and replay.ledger.counts()["ready"] == 2


def test_delivered_groups_survive_their_actor(pool: RolloutPool, weights: Callable[[int], Weights]) -> None:
    replay = new_replay()
    replay.ledger.issue(0, plan(2))
    pump(pool, replay, 0, weights(0))
    items = replay.take(0, 0)
    killed = pids(pool)
    for pid in killed.values():
        os.kill(pid, signal.SIGKILL)
    replay.ledger.issue(1, plan(4, first=2))
    lost = pump(pool, replay, 1, weights(1))  # ends only if both were replaced
    assert {event.actor_id for event in lost} == killed.keys()
    assert replay.find_lost({item.group_id: item.ref for item in items}, timeout_s=30.0) == []
    groups = groups_of(items)
    assert not {group.actor_id for group in groups} - killed.keys()
    assert min(group.nbytes for group in groups) > 100 * 1024, "must be too big for Ray to ship inside a message"


@ray.remote
class Putter:
    """Control: what an actor puts itself dies with it."""

    def pid(self) -> int:
        return os.getpid()

    def put(self) -> list[ray.ObjectRef]:
        return [ray.put(np.zeros(1 << 20))]


def test_what_an_actor_puts_does_not_survive_it() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor = Putter.remote()  # type: ignore[attr-defined]
    pid, refs = bounded_get([actor.pid.remote(), actor.put.remote()], who="putter", timeout_s=60.0)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30.0
    with pytest.raises(ray.exceptions.ObjectLostError):
        while time.monotonic() < deadline:  # Ray takes a second to find out
            bounded_get(refs[0], who="object", timeout_s=30.0)
            time.sleep(0.1)


def test_broken_reward_drops_the_group(pool: RolloutPool, weights: Callable[[int], Weights]) -> None:
    replay = new_replay()
    replay.ledger.issue(0, plan(2, broken=True))
    pump(pool, replay, 0, weights(0))
    assert [item.group_id for item in replay.take(0, 0)] == [1]
    reason = "reward component letters is not a finite number"
    assert replay.ledger.counts()["dropped_by_reason"] == {reason: 1}


@pytest.mark.parametrize("branches", [GreedyBranches(3), DrawnBranches(2, 1.0)])
def test_branches_are_graded_once_for_each_text(
    pool: RolloutPool, weights: Callable[[int], Weights], tiny_model: str, branches: BranchSpec
) -> None:
    sampler = SamplerSpec(4, 4, steps=4, position_rule="random", temperature=0.05)
    spec = GroupSpec(0, Problem("p", {"number": 0}), SIZE, seed=100)
    pool.submit(Lease(0, (spec,)), sampler, weights(0), branches)
    (delivery,) = waited(pool)
    group = bounded_get(delivery.refs[0].whole, who="the group", timeout_s=30.0)
    assert group.branch_step is not None and group.branch_ids is not None and group.branch_rewards is not None
    tokenizer = load_tokenizer(tiny_model)
    asked = 0
    for row in range(SIZE):
        fills = group.branch_ids[row][group.branch_step[row] >= 0].reshape(-1, 4)
        texts = [completion_text(tokenizer, ids_C.tolist()) for ids_C in fills]
        found = group.branch_rewards[row][group.branch_step[row] >= 0].reshape(-1, 2)
        right = group.branch_correct[row][group.branch_step[row] >= 0].ravel()
        digits = np.array([sum(c in "0123456789" for c in text) for text in texts])
        letters = np.array([sum(c.isalpha() for c in text) for text in texts])
        assert (found == np.stack([digits, letters], axis=1)).all() and (right == (digits % 2 == 0)).all()
        asked += len({completion_text(tokenizer, group.completion_ids[row].tolist()), *texts})
    assert delivery.report.groups[0].verdicts == asked
    assert asked < SIZE * (1 + group.branch_step.shape[1] * group.branch_ids.shape[2]), "some texts are equal"


def waited(pool: RolloutPool) -> list[Delivery]:
    deadline = time.monotonic() + 60.0
    while not (events := pool.poll(1.0)):
        assert time.monotonic() < deadline, "nothing is delivered"
    return [event for event in events if isinstance(event, Delivery)]


def test_wrong_weights_are_refused(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    """Half-loaded weights are never sampled from: the next lease loads the right ones, or nothing is drawn."""
    replay, pool = new_replay(), make_pool(1)
    replay.ledger.issue(0, plan(2))
    pump(pool, replay, 0, weights(0))
    replay.ledger.issue(1, plan(2, first=2))
    mixed = Weights(1, weights(1).digest, weights(2).refs)
    with pytest.raises(WeightMismatch, match="adapter version 1"):
        pump(pool, replay, 1, mixed)


def test_evaluation_does_not_depend_on_the_pool(
    pool: RolloutPool, make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights], tmp_path: Path
) -> None:
    problems = [Problem(f"e{i}", {"number": i}) for i in range(12)]
    ledger = new_replay().ledger

    def evaluate(pool: RolloutPool, problems: list[Problem], chosen: Weights) -> list[EvalResult]:
        return pool.evaluate(problems, GREEDY, chosen, chunk_size=5, timeout_s=10.0, expire=ledger.expire)

    alone = evaluate(make_pool(1), problems, weights(1))
    assert [result.problem_id for result in alone] == [problem.id for problem in problems]
    assert evaluate(pool, problems, weights(1)) == alone
    assert evaluate(pool, problems, BASE_WEIGHTS) != alone, "the control: other weights, other completions"
    assert {(len(result.correct), *result.nfe) for result in alone} == {(1, 4)}
    drawn, reports = dataclasses.replace(GREEDY, temperature=1.0, position_rule="random"), {}
    several = pool.evaluate(
        *(problems, drawn, weights(1)),
        chunk_size=5,
        timeout_s=60.0,
        expire=ledger.expire,
        samples=2,
        on_chunk=reports.__setitem__,
    )
    assert all(len(set(result.completions)) == 2 for result in several), "rows have noise of their own"
    assert [result for chunk in range(3) for result in reports[chunk].results] == several
    gate = tmp_path / "gate"
    gate.touch()
    restarts = sum(worker["restarts"] for worker in pool.workers())
    gated = [Problem(p.id, p.fields | {"gate": str(gate)}) if p.id == "e0" else p for p in problems]

    def open_gate() -> list[int]:
        if sum(worker["restarts"] for worker in pool.workers()) > restarts:
            gate.unlink(missing_ok=True)
        return []

    late = pool.evaluate(gated, GREEDY, weights(1), chunk_size=5, timeout_s=4.0, expire=open_gate)
    assert late == alone
    lost = [event for event in pool.poll(0.0) if isinstance(event, ActorLost)]
    assert lost and "did not evaluate in time" in lost[0].error


def test_size_follows_orders(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    replay, pool = new_replay(), make_pool(1)
    pool.set_size(2)
    assert len(pool.workers()) == 2 and pool.idle() == 1
    pool.wait_ready()
    assert pool.idle() == 2
    replay.ledger.issue(0, plan(2))
    lease = replay.ledger.lease(policy_version=0, timeout_s=60.0)
    assert lease is not None
    pool.submit(lease, SAMPLER, weights(0))
    pool.set_size(0)
    assert [worker["state"] for worker in pool.workers()] == ["busy"], "a lease is finished first"
    (event,) = pool.poll(60.0)
    assert isinstance(event, Delivery) and pool.workers() == []
    assert pool.poll(0.0) == []
    with pytest.raises(AssertionError, match="nothing to do"):
        pool.poll(1.0)


def settled(pool: RolloutPool, change: Resize) -> Resize:
    deadline = time.monotonic() + 120.0
    while not change.over:
        assert time.monotonic() < deadline, "the change of size never ends"
        assert pool.poll(0.0) == [], "an actor on trial is nobody's loss"
        time.sleep(0.05)
    return change


def test_pool_grows_and_shrinks_while_it_works(
    make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights], undisturbed: list[dict[str, Any]]
) -> None:
    replay, pool = new_replay(), make_pool(1)
    replay.ledger.issue(0, plan())
    lease = replay.ledger.lease(policy_version=0, timeout_s=60.0)
    assert lease is not None
    pool.submit(lease, SAMPLER, weights(0))
    more = pool.resize(3, timeout_s=120.0)
    assert pool.size == 3 and not more.over
    deliveries: list[Any] = []
    deadline = time.monotonic() + 120.0
    while not (more.over and deliveries):
        assert time.monotonic() < deadline
        deliveries += pool.poll(0.2)
    assert more.error is None and pool.idle() == 3
    replay.deliver(deliveries[0].report, deliveries[0].refs)

    lease = replay.ledger.lease(policy_version=0, timeout_s=60.0)
    assert lease is not None
    pool.submit(lease, SAMPLER, weights(0))
    (busy,) = [worker["actor_id"] for worker in pool.workers() if worker["state"] == "busy"]
    fewer = pool.resize(1, timeout_s=120.0)
    assert fewer.over and [worker["actor_id"] for worker in pool.workers()] == [busy], "idle actors go first"
    pump(pool, replay, 0, weights(0))
    assert content(groups_of(replay.take(0, 0))) == undisturbed


def test_pool_that_grows_in_vain_keeps_its_size_and_its_work(
    tiny_model: str, make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.symlink_to(tiny_model)
    engine = functools.partial(TorchEngine, model_path=str(model), lora=LORA, max_rows=32, threads=1)
    pool, replay = make_pool(1, settings={"make_engine": engine}), new_replay()
    too_many = settled(pool, pool.resize(9, timeout_s=5.0))
    assert too_many.error is not None
    assert "did not start within 5 s: the cluster is short of CPU" in too_many.error, too_many.error
    assert [worker["actor_id"] for worker in pool.workers()] == ["rollout-0"]

    model.unlink()  # fatal for an actor of the run, and the end of a mere attempt
    broken = settled(pool, pool.resize(2, timeout_s=120.0))
    assert broken.error is not None and "ConfigError" in broken.error and pool.size == 1
    replay.ledger.issue(0, plan(2))
    pump(pool, replay, 0, weights(0))
    assert len(replay.take(0, 0)) == 2
    with pytest.raises(ConfigError):  # the control
        pool.set_size(2)
        pool.wait_ready()


def test_start_failures_have_a_name(make_pool: Callable[..., RolloutPool]) -> None:
    with pytest.raises(WaitTimeout, match=r"did not start within 6 s: .*CPU \(9 asked for by each, \d of 6 free\)"):
        make_pool(1, resources={"CPU": 9}, start_timeout_s=6.0)
    missing = functools.partial(TorchEngine, model_path="/nowhere", lora=LORA, max_rows=1)
    with pytest.raises(ConfigError, match="/nowhere"):
        make_pool(1, settings={"make_engine": missing})
    with pytest.raises(ConfigError, match="runs other code"):
        make_pool(1, settings={"code_digest": "0" * 64})
    with pytest.raises(WorkerLost, match="2 rollout actors in a row"):
        make_pool(1, settings={"make_engine": functools.partial(os._exit, 3)}, max_restarts=1)


def test_code_identity_is_that_of_the_tree() -> None:
    code = code_identity()
    assert code.root == str(REPOSITORY) and len(code.digest) == 64


def test_remote_errors_come_out_as_themselves() -> None:
    settings = ActorSettings(functools.partial(os._exit, 3), "patient_task:Patient", 1, 1.0, 1.0, 0, "0" * 64)
    actor: Any = ray.remote(RolloutActor).remote("rollout-x", settings)
    with pytest.raises(ConfigError) as raised:
        bounded_get(actor.start.remote(), who="rollout-x", timeout_s=60.0)
    assert type(raised.value) is ConfigError
    with pytest.raises(WaitTimeout, match=r"a resource that is not there did not answer within 0.2 s"):
        nobody: Any = ray.remote(RolloutActor).options(num_cpus=99).remote("rollout-y", settings)
        bounded_get(nobody.start.remote(), who="a resource that is not there", timeout_s=0.2)


@pytest.mark.heavy
def test_lost_node(
    cluster: dict[str, str],
    make_pool: Callable[..., RolloutPool],
    weights: Callable[[int], Weights],
    undisturbed: list[dict[str, Any]],
) -> None:
    """Groups that lay on a lost node are drawn again, with the same bits."""
    replay = new_replay()
    replay.ledger.issue(0, plan(2))
    with far_node(cluster):
        pool = make_pool(1, resources={"CPU": 1, "far": 1})
        pump(pool, replay, 0, weights(0))
    items = replay.take(0, 0)
    assert replay.find_lost({item.group_id: item.ref for item in items}, timeout_s=60.0) == [0, 1]
    replay.lost([0, 1])
    assert not replay.ledger.complete(0) and replay.ledger.counts()["lost"] == 2
    with far_node(cluster):
        lost = pump(pool, replay, 0, weights(0))
        assert [event.actor_id for event in lost] == ["rollout-0"]
        items = replay.take(0, 0)
        assert replay.find_lost({item.group_id: item.ref for item in items}, timeout_s=60.0) == []
        assert content(groups_of(items)) == undisturbed[:2]


@pytest.mark.heavy
def test_whole_groups_stay_where_they_lie(
    cluster: dict[str, str], make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]
) -> None:
    """The controller has no need of them: it looks for outlines, which are small; and still learns what is lost."""
    replay = new_replay()
    replay.ledger.issue(0, plan(2))
    here = ray.get_runtime_context().get_node_id()
    with far_node(cluster):
        pool = make_pool(1, resources={"CPU": 1, "far": 1})
        pump(pool, replay, 0, weights(0), sampler=dataclasses.replace(SAMPLER, top_k=5))
        refs = {item.group_id: item.ref for item in replay.take(0, 0)}
        assert replay.find_lost(refs, timeout_s=60.0) == []
        places = get_local_object_locations([ref.whole for ref in refs.values()])
        assert all(found["node_ids"] and here not in found["node_ids"] for found in places.values())
        wholes = bounded_get([ref.whole for ref in refs.values()], who="groups", timeout_s=60.0)
        outlines = bounded_get([ref.outline for ref in refs.values()], who="outlines", timeout_s=60.0)
        assert sum(each.nbytes for each in outlines) < 0.5 * sum(each.nbytes for each in wholes)
        places = get_local_object_locations([ref.whole for ref in refs.values()])
        assert all(here in found["node_ids"] for found in places.values()), "control: what is fetched is seen here"
        replay.ledger.issue(1, plan(2, first=2))
        pump(pool, replay, 1, weights(1), sampler=dataclasses.replace(SAMPLER, top_k=5))
        later = {item.group_id: item.ref for item in replay.take(1, 1)}
    assert replay.find_lost(refs | later, timeout_s=60.0) == [2, 3], "the first two lie here as well"


@contextlib.contextmanager
def far_node(joining: dict[str, str]) -> Iterator[None]:
    """Another Ray node on this machine, with a resource that the first one lacks; it is killed at the end."""
    command = [sys.executable, str(REPOSITORY / "deploy" / "loopback_ray.py"), "start", "--block"]
    command += [
        "--address",
        joining["RAY_ADDRESS"],
        "--node-ip-address=127.0.0.1",
        "--num-cpus=1",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    process = subprocess.Popen(
        [*command, "--resources", json.dumps({"far": 1})],
        env=os.environ | joining,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60.0
        while not any(node["Alive"] and "far" in node["Resources"] for node in ray.nodes()):
            assert time.monotonic() < deadline and process.poll() is None, "the second node did not come up"
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
