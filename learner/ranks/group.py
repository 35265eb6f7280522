"""The learner group: DeepSpeed ranks as Ray actors, reserved together in one placement group.

A group whose ranks are not all there any more is of no use: what is left of it waits for the others. ``RanksLost`` says
so, and whoever holds a ``GroupState`` can go on from there with a new group.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from learner.objectives.statistics import Statistics
from learner.ranks.rank import GroupConfig, PublishedAdapter, Rank, RankState, UpdateReport, rank_manners
from learner.ranks.rendezvous import meeting_host
from learner.ranks.trajectories import LearnerRank
from learner.runs.checkpoint import Checkpoint
from learner.runs.stopping import StopRequested
from rewards.errors import WaitTimeout, WorkerLost, first_line
from rollout.adapters import AdapterState
from rollout.given_up import ray_given_up
from rollout.pulse import Pulse, with_pulse
from rollout.waits import bounded_get, bounded_wait, end_actor
from services.store.faults import Cause

_TICK_S = 1.0
"""How often a wait for the ranks calls ``on_tick``."""
_DEATH_IS_HEARD_S = 10.0
"""After another rank has found that it can't reach the dead one."""


class RanksLost(WorkerLost):
    """Ranks died, hang, or what they were given or gave is gone; the group is of no use any more."""

    def __init__(self, message: str, cause: Cause = "died", silent_s: float = 0.0) -> None:
        super().__init__(message)
        self.cause, self.silent_s = cause, silent_s


@dataclass(frozen=True)
class GroupState:
    """All that another group, of the same layout, needs to go on from where this one stood."""

    adapter: PublishedAdapter
    shards: Sequence[bytes]
    """Each rank's optimizer state as safetensors, in rank order."""
    phase: Mapping[str, AdapterState] = field(default_factory=dict)
    """Weights beside the trained ones, of a method that learns in phases."""


def group_state(checkpoint: Checkpoint) -> GroupState:
    """What a checkpoint holds of the ranks."""
    adapter = PublishedAdapter(dict(checkpoint.adapter), checkpoint.progress.adapter_digest, checkpoint.peft_config)
    return GroupState(adapter, checkpoint.shards, checkpoint.phase)


def reserve_ranks(config: GroupConfig, on_tick: Callable[[], None] = lambda: None) -> PlacementGroup | None:
    """Room for all ranks at once, None when they ask for no resources. ``on_tick``: called every second, may raise.

    A run reserves it before its actors start: what is left of the GPUs is theirs, however Ray spreads them. With more
    than half of a GPU each, two ranks never share one, which NCCL refuses.

    Raises:
        WaitTimeout: when the cluster can't hold the ranks within ``timeouts.start``, naming what is missing.
    """
    timeout_s = config.timeouts.start
    bundle = dict(zip(("CPU", "GPU"), config.resources.of("rank"), strict=True))
    bundle = {name: amount for name, amount in bundle.items() if amount > 0}
    if not bundle:
        return None
    placement = placement_group([bundle] * config.learner.ranks, strategy="PACK")
    ready, deadline = [placement.ready()], time.monotonic() + timeout_s
    try:
        while not bounded_wait(ready, who="the learner ranks' placement", timeout_s=_TICK_S)[0]:
            on_tick()
            if time.monotonic() >= deadline:
                wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
                free = ", ".join(f"{ray.available_resources().get(name, 0):g} {name}" for name in bundle)
                raise WaitTimeout(
                    f"the cluster did not give {config.learner.ranks} learner ranks {wanted} each within "
                    f"{timeout_s:g} s (free now: {free}); add nodes, or lower learner.ranks or resources.*_per_rank"
                )
    except BaseException:
        if not ray_given_up():
            remove_placement_group(placement)
        raise
    return placement


def rank_environment(config: GroupConfig) -> dict[str, str]:
    """Variables of a rank's process."""
    # Ray would set OMP_NUM_THREADS=1; torch's deprecation notices about DeepSpeed's calls help no user of ours.
    threads = str(config.resources.threads_per_process)
    environment = {"OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore::FutureWarning"}
    return environment | rank_manners(config).environment()


class LearnerGroup:
    """Starts the ranks and speaks to all of them at once. Every call is bounded.

    Args:
        config: the run's settings.
        model_path: folder or hub name of the base, readable on every node with a rank.
        adapter: weights to start from; None for a fresh adapter.
        shards: each rank's optimizer state from a checkpoint, in rank order; None for a fresh optimizer.
        on_tick: called every second of a wait for the ranks, their start included, in the thread that waits; when it
            raises StopRequested, the ranks are killed, but no hosts.
        rank_type: what the ranks learn from; None for groups of trajectories.
        placement: what ``reserve_ranks`` gave, and the group's to give back; None reserves here.
        hosts: one ``learner.ranks.one_process.OneProcess`` for each rank, which becomes that rank too and stays the
            caller's to end; None for processes of the group's own.

    Raises:
        WaitTimeout: when the cluster can't hold the ranks, naming what is missing.
        RanksLost: from each call that needs the ranks, the start included, naming the rank.
    """

    def __init__(
        self,
        config: GroupConfig,
        model_path: str,
        *,
        adapter: AdapterState | None,
        shards: Sequence[bytes] | None,
        on_tick: Callable[[], None] = lambda: None,
        rank_type: type[Rank] | None = None,
        placement: PlacementGroup | None = None,
        hosts: Sequence[Any] | None = None,
    ) -> None:
        self.config, self._on_tick = config, on_tick
        self.doing: tuple[str, float] | None = None
        """What the ranks were asked and when (Unix seconds), until all have answered."""
        self.heard: float | None = None
        """When all ranks last answered, Unix seconds."""
        self._rank_type = rank_type or LearnerRank
        self._hosted = hosts is not None
        self._placement = placement if placement or self._hosted else reserve_ranks(config, on_tick)
        try:
            self._ranks = list(hosts or (self._launch(model_path, rank) for rank in range(config.learner.ranks)))
            self._pulses: list[Pulse] = []
            if self._hosted:
                become = [each.become.remote(config, model_path, rank) for rank, each in enumerate(self._ranks)]
                self._answers(become, "become", config.timeouts.start, on_tick)
            self.descriptions = self._start(adapter, shards)
            # Not while they start: to load a model may hold Python's lock for long.
            self._pulses = [Pulse(rank, config.timeouts.heartbeat) for rank in self._ranks]
        except BaseException:
            self.close()
            raise

    def update(
        self,
        refs: Sequence[Any],
        update_index: int,
        lr: float,
        *,
        on_tick: Callable[[], None] | None = None,
    ) -> UpdateReport:
        """One optimizer step on what is behind ``refs``; the ranks' reports as one. ``on_tick`` is called instead
        of the group's, for a wait in another thread."""
        reports: list[UpdateReport] = self._all(
            "update", list(refs), update_index, lr, limit=self.config.timeouts.update, on_tick=on_tick
        )
        first = reports[0]
        for description, report in zip(self.descriptions, reports, strict=True):
            description["usage"] = report.usage
        return UpdateReport(
            statistics=Statistics.merged(report.statistics for report in reports),
            plan_statistics=first.plan_statistics,
            loss=sum(report.loss for report in reports),
            grad_norm=first.grad_norm,
            applied=first.applied,
            learning_rate=first.learning_rate,
            forwards=sum(report.forwards for report in reports),
            seconds=max(report.seconds for report in reports),
            credit=first.credit,
            scored=tuple(view for report in reports for view in report.scored),
        )

    def gradient(self, refs: Sequence[Any], update_index: int) -> AdapterState:
        """The whole gradient of an update, whose step is not taken."""
        return self._all("gradient", list(refs), update_index, limit=self.config.timeouts.update)[0]

    def publish(self) -> PublishedAdapter:
        """The adapter as rank 0 holds it."""
        return self._all("publish", limit=self.config.timeouts.publish)[0]

    def enter_phase(self, number: int, state: Mapping[str, AdapterState] | None = None) -> None:
        """Begin a phase, or go on in one with what a ``GroupState`` holds of it; see ``LearnerRank.enter_phase``."""
        self._all("enter_phase", number, state, limit=self.config.timeouts.publish)

    def commit(self, *, on_tick: Callable[[], None] | None = None) -> GroupState:
        """Where the group stands. ``on_tick``: called meanwhile, every second, instead of the group's own."""
        states: list[RankState] = self._all("commit", limit=self.config.timeouts.checkpoint, on_tick=on_tick)
        adapter, shard = states[0].adapter, states[0].shard
        assert adapter is not None and shard is not None, "rank 0 gives both"
        return GroupState(adapter, [each.shard or shard for each in states], states[0].phase)

    @property
    def closed(self) -> bool:
        return not self._ranks

    def close(self) -> None:
        """End the ranks and give their resources back; hosts are left as they are."""
        for actor in [] if self._hosted else getattr(self, "_ranks", []):
            end_actor(actor)
        self._ranks, self._pulses = [], []
        if self._placement is not None and not ray_given_up():
            remove_placement_group(self._placement)
        self._placement = None

    def _launch(self, model_path: str, rank: int) -> Any:
        resources = self.config.resources
        strategy: Any = "DEFAULT"
        if self._placement is not None:
            strategy = PlacementGroupSchedulingStrategy(self._placement, placement_group_bundle_index=rank)
        options = {
            "name": None,
            "num_cpus": resources.cpus_per_rank,
            "num_gpus": resources.gpus_per_rank,
            "max_restarts": 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": rank_environment(self.config)},
        }
        remote = with_pulse(self._rank_type).options(**options)
        return remote.remote(self.config, model_path, rank, self.config.learner.ranks)

    def _start(self, adapter: AdapterState | None, shards: Sequence[bytes] | None) -> list[dict[str, Any]]:
        timeout_s = self.config.timeouts.start
        addresses = [self._asked(rank, "node_address") for rank in self._ranks]
        nodes = self._answers(addresses, "address", timeout_s, self._on_tick)
        place = self._asked(self._ranks[0], "listen", meeting_host(nodes))
        address = self._answers([place], "listen", timeout_s, self._on_tick)[0]
        given = shards if shards is not None else [None] * len(self._ranks)
        starts = [
            self._asked(actor, "start", address, adapter, shard)
            for actor, shard in zip(self._ranks, given, strict=True)
        ]
        return self._answers(starts, "start", timeout_s, self._on_tick)

    def _asked(self, actor: Any, method: str, *args: Any) -> ray.ObjectRef[Any]:
        if self._hosted:
            return actor.as_rank.remote(method, *args)
        return getattr(actor, method).remote(*args)

    def _all(self, method: str, *args: Any, limit: float, on_tick: Callable[[], None] | None = None) -> list[Any]:
        refs = [self._asked(actor, method, *args) for actor in self._ranks]
        self.doing = method, time.time()
        try:
            return self._answers(refs, method, limit, on_tick or self._on_tick)
        except StopRequested:
            self.close()  # the ranks are in the middle of something, and nobody will wait for its end
            raise
        finally:
            self.doing = None

    def _require_pulse(self, method: str) -> None:
        for rank, pulse in enumerate(self._pulses):
            if (trouble := pulse.trouble(f"learner rank {rank} ('{method}')")) is not None:
                raise RanksLost(*trouble)

    def _blame_a_dead_one(
        self, refs: list[ray.ObjectRef[Any]], rank: int, method: str, error: Exception, on_tick: Callable[[], None]
    ) -> None:
        """Raises RanksLost when another rank turns out to be dead: what failed is the exchange with it, and this may be
        heard before Ray has heard of the death."""
        pending, deadline = [ref for ref in refs if ref is not refs[rank]], time.monotonic() + _DEATH_IS_HEARD_S
        while pending and time.monotonic() < deadline:
            done, pending = bounded_wait(pending, who="learner ranks", timeout_s=_TICK_S)
            on_tick()
            self._require_pulse(method)
            for other in map(refs.index, done):
                try:
                    bounded_get(refs[other], who=f"learner rank {other} ({method})", timeout_s=_TICK_S)
                except ray.exceptions.RayActorError as dead:
                    text = f"learner rank {other} died during '{method}': {first_line(dead)}"
                    raise RanksLost(f"{text}; rank {rank} said: {first_line(error)}") from error
                except (ray.exceptions.RayError, WaitTimeout):
                    continue  # it fails as this one does; an error of ours says more, and is raised

    def _answers(
        self, refs: list[ray.ObjectRef[Any]], method: str, timeout_s: float, on_tick: Callable[[], None] = lambda: None
    ) -> list[Any]:
        """All ranks' answers. The first rank that fails is named at once, since the others wait for it in vain."""
        answers: dict[int, Any] = {}
        pending, deadline = list(refs), time.monotonic() + timeout_s
        while pending:
            left = deadline - time.monotonic()
            done, pending = bounded_wait(pending, who="learner ranks", timeout_s=min(max(left, 0.0), _TICK_S))
            if not done and left > 0:
                on_tick()
                self._require_pulse(method)
                continue
            if not done:
                late = ", ".join(str(refs.index(ref)) for ref in pending)
                raise RanksLost(f"learner rank {late} did not finish '{method}' within {timeout_s:g} s", "late")
            rank = refs.index(done[0])
            try:
                answers[rank] = bounded_get(done[0], who=f"learner rank {rank} ({method})", timeout_s=timeout_s)
            except ray.exceptions.RayActorError as error:
                raise RanksLost(f"learner rank {rank} died during '{method}': {first_line(error)}") from error
            except ray.exceptions.ObjectLostError as error:
                text = f"what learner rank {rank} was given or gave in '{method}' is gone"
                raise RanksLost(f"{text}: {first_line(error)}", "lost") from error
            except ray.exceptions.RayTaskError as error:
                self._blame_a_dead_one(refs, rank, method, error, on_tick)
                raise
        self.heard = time.time()
        return [answers[rank] for rank in range(len(refs))]
