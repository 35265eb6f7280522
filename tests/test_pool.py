"""Actors, pool and replay buffer on a real local Ray with the real engine: deaths, hangs, late answers, lost objects."""

import functools
import json
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

from rewards.errors import ConfigError, WaitTimeout, WeightMismatch, WorkerLost
from rewards.task import Problem
from rollout.actor import BASE_WEIGHTS, ActorSettings, EvalResult, RolloutActor, Weights, code_identity
from rollout.adapters import adapter_parameters, digest, pack
from rollout.engines.torch import TorchEngine
from rollout.ledger import STATUSES, Ledger
from rollout.models.lora import LoraSpec
from rollout.pool import ActorLost, Delivery, RolloutPool
from rollout.replay import ReplayBuffer, ReplayItem
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from rollout.waits import bounded_get, bounded_wait

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
LORA = LoraSpec(r=2, alpha=4.0)
# 16 completions of 256 tokens: a group is above the size up to which Ray ships values inside messages.
SAMPLER = SamplerSpec(256, 256, steps=4, position_rule="random", temperature=1.0)
SIZE = 16
GREEDY = SamplerSpec(16, 16, steps=4, position_rule="low_confidence", temperature=0.0)

# A user's task. Its grader waits while the file fields["gate"] exists, and says so in a file beside it, which lets a test
# stop an actor in the middle of a lease.
PATIENT = '''
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
'''


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    tasks = tmp_path_factory.mktemp("tasks")
    (tasks / "patient_task.py").write_text(PATIENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tasks), str(REPOSITORY)]))
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=f"/tmp/unmask-{os.getpid()}",
        )
        yield
        ray.shutdown()


@pytest.fixture
def make_pool(tiny_model: str) -> Iterator[Callable[..., RolloutPool]]:
    pools = []

    def make(size: int = 1, *, ready: bool = True, settings: dict[str, Any] | None = None, **changes: Any) -> RolloutPool:
        engine = functools.partial(TorchEngine, model_path=tiny_model, lora=LORA, max_rows=16, threads=1)
        defaults: dict[str, Any] = {
            "make_engine": engine,
            "task": "patient_task:Patient",
            "graders": 1,
            "grade_timeout_s": 120.0,
            "pull_timeout_s": 30.0,
            "run_seed": 7,
            "code_digest": code_identity().digest,
        }
        options: dict[str, Any] = {
            "resources": {"CPU": 1},
            "threads": 1,
            "start_timeout_s": 120.0,
            "max_restarts": 3,
        }
        pool = RolloutPool(ActorSettings(**defaults | (settings or {})), size=size, **options | changes)
        pools.append(pool)
        if ready:
            pool.wait_ready()
        return pool

    yield make
    for pool in pools:
        pool.close()


@functools.cache
def published(tiny_model: str, version: int) -> Weights:
    """Adapter weights that differ by version, in the object store."""
    engine = TorchEngine(model_path=tiny_model, lora=LORA, max_rows=1)
    generator = torch.Generator().manual_seed(version)
    tensors = {
        name: 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in adapter_parameters(engine.model).items()
    }
    state = pack(tensors)
    return Weights(version, digest(state), [ray.put(state)])


@pytest.fixture
def weights(tiny_model: str) -> Callable[[int], Weights]:
    return functools.partial(published, tiny_model)


def plan(count: int = 4, first: int = 0, **fields: Any) -> list[GroupSpec]:
    """Groups; ``fields`` go to the first one's grader."""
    return [
        GroupSpec(i, Problem(f"p{i}", {"number": i} | (fields if i == first else {})), SIZE, seed=100 + i)
        for i in range(first, first + count)
    ]


def new_replay(max_staleness: int = 0) -> ReplayBuffer:
    return ReplayBuffer(Ledger(capacity=8, groups_per_lease=2, max_staleness=max_staleness))


def pump(
    pool: RolloutPool,
    replay: ReplayBuffer,
    iteration: int,
    weights: Weights,
    *,
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
            pool.submit(lease, SAMPLER, weights)
        for event in pool.poll(0.1):
            if isinstance(event, Delivery):
                replay.deliver(event.report, event.refs)
            else:
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
    return [bounded_get(item.ref, who=f"group {item.group_id}", timeout_s=30.0) for item in items]


def content(groups: list[TrajectoryGroup]) -> list[tuple[Any, ...]]:
    """All that must repeat bit for bit: everything but times and who did it."""
    arrays = ("prompt_ids", "completion_ids", "unmask_step", "unmask_rank", "drawn", "logp", "logp_raw", "entropy")
    arrays += ("rewards", "correct", "nfe")
    return [
        (g.group_id, g.problem_id, g.policy_version, g.adapter_digest, g.seed, g.reward_names)
        + tuple(getattr(g, name).tobytes() for name in arrays)
        for g in groups
    ]


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


@pytest.fixture
def undisturbed(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> list[tuple[Any, ...]]:
    replay, pool = new_replay(), make_pool(2)
    replay.ledger.issue(0, plan())
    assert pump(pool, replay, 0, weights(0)) == []
    return content(groups_of(replay.take(0, 0)))


def test_an_iteration(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    replay, pool = new_replay(), make_pool(2)
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
            assert item.report.solved == group.correct.sum()
            assert item.report.mean_reward == pytest.approx(group.rewards.sum() / SIZE)
            assert group.actor_id in pids(pool)
        replay.commit(items, version)
    assert replay.ledger.counts()["consumed"] == 8
    assert {worker["policy_version"] for worker in pool.workers()} <= {0, 1}
    assert all(worker["state"] == "idle" and worker["restarts"] == 0 for worker in pool.workers())


def test_killed_actor_changes_nothing(
    make_pool: Callable[..., RolloutPool],
    weights: Callable[[int], Weights],
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    """SIGKILL in the middle of a lease: it is leased again, the ledger balances, the same bits come out."""
    replay, pool = new_replay(), make_pool(2)
    before = pids(pool)
    killer = AtGate(tmp_path / "gate", pool, signal.SIGKILL)
    replay.ledger.issue(0, plan(gate=str(killer.gate)))
    lost = pump(pool, replay, 0, weights(0), every_turn=killer)
    assert killer.done and [event.lease_id for event in lost] == [0]
    assert "ActorDied" in lost[0].error
    counts = replay.ledger.counts()
    assert (counts["failed"], counts["relet"], counts["ready"]) == (1, 1, 4)
    assert content(groups_of(replay.take(0, 0))) == undisturbed
    pool.wait_ready()
    assert sorted(worker["restarts"] for worker in pool.workers()) == [0, 1]
    assert pids(pool).keys() == before.keys() and pids(pool) != before


def test_other_weights_give_other_bits(
    make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights], undisturbed: list[tuple[Any, ...]]
) -> None:
    """The control of the test above: its comparison sees a difference, also in the tokens alone."""
    replay, pool = new_replay(max_staleness=1), make_pool(1)
    replay.ledger.issue(0, plan())
    pump(pool, replay, 0, weights(1))
    groups = content(groups_of(replay.take(0, 1)))
    assert all(ours[7] != theirs[7] for ours, theirs in zip(groups, undisturbed, strict=True))


def test_hanging_actor_is_replaced(
    make_pool: Callable[..., RolloutPool],
    weights: Callable[[int], Weights],
    undisturbed: list[tuple[Any, ...]],
    tmp_path: Path,
) -> None:
    replay, pool = new_replay(), make_pool(1)
    stopper = AtGate(tmp_path / "gate", pool, signal.SIGSTOP)
    replay.ledger.issue(0, plan(gate=str(stopper.gate)))
    # Short while the actor is to be found stuck, and long enough for the repetition on a loaded machine.
    lost = pump(pool, replay, 0, weights(0), lease_timeout_s=8.0, every_turn=stopper)
    assert stopper.done
    assert lost[0].lease_id == 0 and "did not deliver lease 0 in time" in lost[0].error
    assert replay.ledger.counts()["expired"] >= 1
    assert content(groups_of(replay.take(0, 0))) == undisturbed


def test_second_delivery_is_refused(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    replay, pool = new_replay(), make_pool(2)
    replay.ledger.issue(0, plan(2))
    first = replay.ledger.lease(policy_version=0, timeout_s=60.0)
    second = replay.ledger.second_lease(after_s=0.0, policy_version=0, timeout_s=60.0)
    assert first is not None and second is not None
    for lease in (first, second):
        pool.submit(lease, SAMPLER, weights(0))
    accepted = []
    while len(accepted) < 2:
        for event in pool.poll(30.0):
            assert isinstance(event, Delivery)
            accepted.append(replay.deliver(event.report, event.refs))
    assert accepted == [[0, 1], []]
    assert replay.ledger.counts()["refused"] == 1 and replay.ledger.counts()["ready"] == 2


def test_delivered_groups_survive_their_actor(
    make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]
) -> None:
    replay, pool = new_replay(), make_pool(1)
    replay.ledger.issue(0, plan(2))
    pump(pool, replay, 0, weights(0))
    os.kill(pids(pool)["rollout-0"], signal.SIGKILL)
    items = replay.take(0, 0)
    while not pool.poll(1.0) and pool.idle():  # until the death is noticed
        lease = Ledger(capacity=2, groups_per_lease=2, max_staleness=0)
        lease.issue(0, plan(2))
        pool.submit(lease.lease(policy_version=0, timeout_s=60.0), SAMPLER, weights(0))  # type: ignore[arg-type]
    assert replay.find_lost(items, timeout_s=30.0) == []
    groups = groups_of(items)
    assert min(group.nbytes for group in groups) > 100 * 1024, "must be too big for Ray to ship inside a message"


class Putter:
    """Control: what an actor puts itself dies with it."""

    def pid(self) -> int:
        return os.getpid()

    def put(self) -> list[ray.ObjectRef]:
        return [ray.put(np.zeros(1 << 20))]


def test_what_an_actor_puts_does_not_survive_it() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    actor = ray.remote(Putter).remote()
    pid, refs = bounded_get([actor.pid.remote(), actor.put.remote()], who="putter", timeout_s=60.0)
    os.kill(pid, signal.SIGKILL)
    bounded_wait([actor.pid.remote()], who="death of the putter", timeout_s=30.0)
    with pytest.raises(ray.exceptions.ObjectLostError):
        bounded_get(refs[0], who="object", timeout_s=30.0)


def test_broken_reward_drops_the_group(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    replay, pool = new_replay(), make_pool(1)
    replay.ledger.issue(0, plan(2, broken=True))
    pump(pool, replay, 0, weights(0))
    assert [item.group_id for item in replay.take(0, 0)] == [1]
    reason = "reward component letters is not a finite number"
    assert replay.ledger.counts()["dropped_by_reason"] == {reason: 1}


def test_wrong_weights_are_refused(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    """Half-loaded weights are never sampled from: the next lease loads the right ones, or nothing is drawn."""
    replay, pool = new_replay(max_staleness=3), make_pool(1)
    replay.ledger.issue(0, plan(2))
    pump(pool, replay, 0, weights(0))
    replay.ledger.issue(1, plan(2, first=2))
    mixed = Weights(1, weights(1).digest, weights(2).refs)
    with pytest.raises(WeightMismatch, match="adapter version 1"):
        pump(pool, replay, 1, mixed)


def test_evaluation_does_not_depend_on_the_pool(
    make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights], tmp_path: Path
) -> None:
    problems = [Problem(f"e{i}", {"number": i}) for i in range(12)]
    ledger = new_replay().ledger

    def evaluate(pool: RolloutPool, problems: list[Problem], chosen: Weights) -> list[EvalResult]:
        return pool.evaluate(problems, GREEDY, chosen, chunk_size=5, timeout_s=10.0, expire=ledger.expire)

    alone = evaluate(make_pool(1), problems, weights(1))
    assert [result.problem_id for result in alone] == [problem.id for problem in problems]
    pool = make_pool(2)
    assert evaluate(pool, problems, weights(1)) == alone
    assert evaluate(pool, problems, BASE_WEIGHTS) != alone, "the control: other weights, other completions"
    gate = tmp_path / "gate"
    gate.touch()
    gated = [Problem(p.id, p.fields | {"gate": str(gate)}) if p.id == "e0" else p for p in problems]

    def open_gate() -> list[int]:
        if any(worker["restarts"] for worker in pool.workers()) and gate.exists():
            gate.unlink()
        return []

    late = pool.evaluate(gated, GREEDY, weights(1), chunk_size=5, timeout_s=4.0, expire=open_gate)
    assert late == alone
    lost = [event for event in pool.poll(0.0) if isinstance(event, ActorLost)]
    assert lost and "did not evaluate in time" in lost[0].error


def test_size_follows_orders(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    replay, pool = new_replay(), make_pool(1)
    pool.set_size(3)
    assert len(pool.workers()) == 3 and pool.idle() == 1
    pool.wait_ready()
    assert pool.idle() == 3
    replay.ledger.issue(0, plan(2))
    lease = replay.ledger.lease(policy_version=0, timeout_s=60.0)
    assert lease is not None
    pool.submit(lease, SAMPLER, weights(0))
    pool.set_size(0)
    assert [worker["state"] for worker in pool.workers()] == ["busy"], "a lease is finished first"
    (event,) = pool.poll(60.0)
    assert isinstance(event, Delivery) and pool.workers() == []


def test_start_failures_have_a_name(make_pool: Callable[..., RolloutPool]) -> None:
    with pytest.raises(WaitTimeout, match=r"rollout-1 did not start within 6 s: .*CPU \(3 asked for by each, 1 of 4 free\)"):
        make_pool(2, resources={"CPU": 3}, start_timeout_s=6.0)
    missing = functools.partial(TorchEngine, model_path="/nowhere", lora=LORA, max_rows=1)
    with pytest.raises(ConfigError, match="/nowhere"):
        make_pool(settings={"make_engine": missing})
    with pytest.raises(ConfigError, match="runs other code"):
        make_pool(settings={"code_digest": "0" * 64})
    with pytest.raises(WorkerLost, match="3 rollout actors in a row"):
        make_pool(settings={"make_engine": functools.partial(os._exit, 3)}, max_restarts=2)


def test_code_identity_is_that_of_the_tree() -> None:
    code = code_identity()
    assert code.root == str(REPOSITORY) and len(code.digest) == 64


def test_remote_errors_come_out_as_themselves() -> None:
    settings = ActorSettings(functools.partial(os._exit, 3), "patient_task:Patient", 1, 1.0, 1.0, 0, "0" * 64)
    actor = ray.remote(RolloutActor).remote("rollout-x", settings)
    with pytest.raises(ConfigError) as raised:
        bounded_get(actor.start.remote(), who="rollout-x", timeout_s=60.0)
    assert type(raised.value) is ConfigError
    with pytest.raises(WaitTimeout, match=r"a resource that is not there did not answer within 0.2 s"):
        nobody = ray.remote(RolloutActor).options(num_cpus=99).remote("rollout-y", settings)
        bounded_get(nobody.start.remote(), who="a resource that is not there", timeout_s=0.2)


def test_lost_node(make_pool: Callable[..., RolloutPool], weights: Callable[[int], Weights]) -> None:
    """Groups that lay on a lost node are drawn again, with the same bits."""
    replay = new_replay()
    replay.ledger.issue(0, plan(2))
    node = far_node()
    try:
        pool = make_pool(1, resources={"CPU": 1, "far": 1})
        pump(pool, replay, 0, weights(0))
        before = content(groups_of(replay.take(0, 0)))
        # Only the copy on the far node counts: free what the comparison brought here.
        again = new_replay()
        again.ledger.issue(0, plan(2))
        pump(pool, again, 0, weights(0))
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.communicate(timeout=10)
    items = again.take(0, 0)
    assert again.find_lost(items, timeout_s=60.0) == [0, 1]
    again.lost([0, 1])
    assert not again.ledger.complete(0) and again.ledger.counts()["lost"] == 2
    node = far_node()
    try:
        pump(pool, again, 0, weights(0))
        items = again.take(0, 0)
        assert again.find_lost(items, timeout_s=60.0) == []
        assert content(groups_of(items)) == before
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.communicate(timeout=10)


def far_node() -> "subprocess.Popen[bytes]":
    """Another Ray node on this machine, with a resource that the first one lacks."""
    address = ray.get_runtime_context().gcs_address
    command = [str(Path(sys.executable).with_name("ray")), "start", "--address", address, "--block", "--num-cpus=1"]
    process = subprocess.Popen(
        [*command, "--resources", json.dumps({"far": 1}), "--min-worker-port=0", "--max-worker-port=0"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60.0
    while not any(node["Alive"] and "far" in node["Resources"] for node in ray.nodes()):
        assert time.monotonic() < deadline and process.poll() is None, "the second node did not come up"
        time.sleep(0.2)
    return process
