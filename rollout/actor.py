"""The rollout actor: takes a lease, draws its groups with the engine, has them graded, and returns them.

A plain class; ``rollout.pool`` makes it a Ray actor. Nothing in it depends on timing except the times it reports.
"""

import dataclasses
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from rewards.diversity import distances_to_others
from rewards.errors import ConfigError, WeightMismatch
from rewards.judge.judged import load_task
from rewards.judge.settings import UNJUDGED, JudgeSettings
from rewards.task import Problem
from rollout.adapters import AdapterState
from rollout.code import code_identity
from rollout.engines.base import Engine
from rollout.gpu import larger_gpu, told_when_full
from rollout.grading import GradeResult, GraderPool
from rollout.messages import (
    EvalReport,
    EvalResult,
    GradingFault,
    GroupReport,
    LeaseReport,
    Weights,
    content_digest,
)
from rollout.models.encoding import completion_text, completion_texts, encode
from rollout.seeds import derive_seed
from rollout.trajectory import (
    DIVERSITY,
    SPEED,
    BranchSpec,
    GroupSpec,
    Lease,
    SamplerSpec,
    TrajectoryGroup,
)
from rollout.usage import process_usage
from rollout.vouching import digest_by_node
from rollout.waits import bounded_get

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ActorSettings:
    """What all actors of a pool have in common.

    Times in seconds.
    """

    make_engine: Callable[[], Engine]
    """Called in the actor's process."""
    task: str
    """Name for ``rewards.task.get_task``."""
    graders: int
    """Grader processes of each actor."""
    grade_timeout_s: float
    """For one verdict."""
    pull_timeout_s: float
    """For fetching an adapter."""
    run_seed: int
    """Names the random streams of evaluations; a lease's groups bring their own seeds."""
    code_digest: str
    """The controller's ``code_identity().digest``; an actor with other code refuses to start."""
    speed_weight: float = 0.0
    """Of the reward's part ``SPEED``, where a threshold decoded the completions and one of the group is right."""
    diversity_weight: float = 0.0
    """Of the reward's part ``DIVERSITY``."""
    judge: JudgeSettings = UNJUDGED
    """Whose score is a part of the reward, where it names one."""
    remedy: Callable[[], str] = larger_gpu
    """What to change first when the GPU's memory didn't suffice; called in the actor's process."""


class RolloutActor:
    """One engine and its graders. Call ``start`` first."""

    def __init__(self, actor_id: str, settings: ActorSettings) -> None:
        self._actor_id = actor_id
        self._settings = settings
        self._kept: AdapterState = {}
        """what the engine has loaded, where it lies in the node's memory (``rollout.vouching``)"""

    def ping(self) -> None:
        """Answers, in a thread of its own (``rollout.pulse``)."""

    def start(self) -> dict[str, Any]:
        """Build engine and graders, and say where and what this actor is.

        Not part of the constructor, because Ray reports what a constructor raises as the actor's death.

        Raises:
            ConfigError: the model or task can't be had, or this process runs other code than the controller.
            OutOfMemory: the GPU's memory didn't suffice, here and in all that follows.
        """
        code = code_identity()
        logger.info("%s runs the code in %s (sha256 %s)", self._actor_id, code.root, code.digest[:12])
        if code.digest != self._settings.code_digest:
            raise ConfigError(
                f"{self._actor_id} on {socket.gethostname()} runs other code (in {code.root}) than the controller; "
                "install the same version on all nodes, or submit the job with --working-dir"
            )
        self._task = load_task(self._settings.task, self._settings.judge)
        weights = {SPEED: self._settings.speed_weight, DIVERSITY: self._settings.diversity_weight}
        if taken := [name for name, weight in weights.items() if weight and name in self._task.components]:
            raise ConfigError(
                f"task {self._settings.task} has a reward part {taken[0]!r} of its own; rename it, or leave "
                f"reward.{taken[0]}_weight at 0"
            )
        with self._told_when_full():
            self._engine = self._settings.make_engine()
        self._graders = GraderPool(
            self._settings.task,
            workers=self._settings.graders,
            timeout_s=self._settings.grade_timeout_s,
            judge=self._settings.judge,
        )
        return {
            "actor_id": self._actor_id,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "python": sys.version.split()[0],
            "code": dataclasses.asdict(code),
            "engine": self._engine.describe(),
        }

    def run_lease(
        self, lease: Lease, sampler: SamplerSpec, weights: Weights, branches: BranchSpec | None = None
    ) -> tuple[Any, ...]:
        """Draw and grade the lease's groups: its LeaseReport, then one TrajectoryGroup per group, in the lease's order.
        ``branches`` says which states of their completions are branched and graded too.

        Raises:
            WeightMismatch: the weights that were loaded are not those that were published.
            TrajectoryError: the engine broke the trajectory contract.
            WaitTimeout: the adapter could not be fetched in time.
        """
        begin = time.perf_counter()
        self._hold(weights)
        loaded = time.perf_counter()
        drawn, asked = self._generate(lease.groups, sampler, branches)
        generated = time.perf_counter()
        groups, reports = [], []
        for group, pending in zip(drawn, asked, strict=True):
            grades = self._collect(pending)
            groups.append(self._with_grades(group, grades))
            reports.append(_report(groups[-1], grades))
        report = LeaseReport(
            lease_id=lease.lease_id,
            actor_id=self._actor_id,
            policy_version=weights.version,
            adapter_digest=weights.digest,
            groups=tuple(reports),
            load_s=loaded - begin,
            generate_s=generated - loaded,
            grade_wait_s=time.perf_counter() - generated,
            usage=process_usage(),
        )
        return report, *groups

    def evaluate(
        self, problems: Sequence[Problem], sampler: SamplerSpec, weights: Weights, samples: int = 1, keep: int = 0
    ) -> EvalReport:
        """``samples`` graded completions per problem, all in one call of the engine; temperature 0 decodes greedily.
        The trajectories of the first ``keep`` problems are in their results.

        Raises as ``run_lease`` does.
        """
        self._hold(weights)
        seeds = [derive_seed(self._settings.run_seed, problem.id, "evaluation") for problem in problems]
        specs = [
            GroupSpec(i, problem, samples, seed) for i, (problem, seed) in enumerate(zip(problems, seeds, strict=True))
        ]
        begin = time.perf_counter()
        groups, asked = self._generate(specs, sampler)
        generated = time.perf_counter()
        results = [
            self._eval_result(group, self._collect(pending), with_trajectory=group.group_id < keep)
            for group, pending in zip(groups, asked, strict=True)
        ]
        return EvalReport(results, generated - begin)

    def _eval_result(self, group: TrajectoryGroup, graded: Sequence["_Grades"], *, with_trajectory: bool) -> EvalResult:
        grades = [row.completion for row in graded]
        return EvalResult(
            problem_id=group.problem_id,
            completions=completion_texts(self._engine.tokenizer, group),
            correct=tuple(grade.correct for grade in grades),
            components={name: tuple(grade.components[name] for grade in grades) for name in self._task.components},
            tokens=tuple(group.drawn.sum(axis=1).tolist()),
            nfe=tuple(group.nfe.tolist()),
            faults=_faults(grades),
            trajectory=self._with_grades(group, graded) if with_trajectory else None,
        )

    def _hold(self, weights: Weights) -> None:
        """Have the engine hold these weights.

        It holds none from the begin of a load to its good end, so one that failed half-way is repeated before anything
        is drawn.
        """
        wanted = (weights.version, weights.digest)
        if not weights.refs:
            self._engine.without_adapter()
            self._kept = {}
        elif self._held() != wanted:
            who = f"adapter of version {weights.version} (put by the controller, fetched by {self._actor_id})"
            adapter = bounded_get(weights.refs[0], who=who, timeout_s=self._settings.pull_timeout_s)
            hashed = digest_by_node(weights.refs[0])
            self._engine.load_adapter(weights.version, adapter, weights.digest, hashed=hashed)
            self._kept = adapter
        if self._held() != wanted:
            raise WeightMismatch(f"{self._actor_id} was asked to draw with {wanted} and holds {self._held()}")

    def _held(self) -> tuple[int, str]:
        return self._engine.policy_version, self._engine.adapter_digest

    def _generate(
        self, specs: Sequence[GroupSpec], sampler: SamplerSpec, branches: BranchSpec | None = None
    ) -> tuple[list[TrajectoryGroup], list[list["_Asked"]]]:
        """Groups without grades, and what each of their rows asked the graders, who work while the engine does."""
        tokenizer = self._engine.tokenizer
        prompts = [encode(tokenizer, self._task.prompt(spec.problem.fields)) for spec in specs]
        asked: dict[tuple[int, int], _Asked] = {}

        def grade(group: int, completion: int, ids_FC: np.ndarray, place_C: np.ndarray | None) -> None:
            fields = specs[group].problem.fields
            texts = [completion_text(tokenizer, ids_C.tolist(), place_C) for ids_C in ids_FC]
            futures = {text: self._graders.submit(fields, text) for text in dict.fromkeys(texts)}
            number = {text: i for i, text in enumerate(futures)}
            asked[group, completion] = _Asked(list(futures.values()), [number[text] for text in texts])

        with self._told_when_full():
            groups = self._engine.generate(
                specs,
                [prompt.ids for prompt in prompts],
                sampler,
                gaps=[prompt.gaps for prompt in prompts],
                branches=branches,
                on_completion=grade,
            )
        return groups, [[asked[g, c] for c in range(spec.size)] for g, spec in enumerate(specs)]

    def _told_when_full(self) -> AbstractContextManager[None]:
        return told_when_full(self._actor_id, self._settings.remedy)

    def _collect(self, asked: Sequence["_Asked"]) -> list["_Grades"]:
        found = iter(self._graders.collect([future for row in asked for future in row.futures]))
        return [_Grades([next(found) for _ in row.futures], row.of_text) for row in asked]

    def _with_grades(self, group: TrajectoryGroup, grades: Sequence["_Grades"]) -> TrajectoryGroup:
        names = tuple(self._task.components)
        verdicts = [grade for row in grades for grade in row.verdicts]
        counters = {
            "grader_timeouts": sum(grade.timed_out for grade in verdicts),
            "grader_crashes": sum(grade.crashed for grade in verdicts),
        }
        correct_G = np.array([row.completion.correct for row in grades], dtype=np.bool_)
        rewards_GR, parts = _rewards([row.completion for row in grades], names), names
        if self._settings.speed_weight and group.sampler.threshold is not None:
            # Where nothing is right, speed would be all that there is to learn.
            weight = self._settings.speed_weight if correct_G.any() else 0.0
            speed_G = weight * group.tokens_per_forward([self._engine.tokenizer.eos_token_id])
            rewards_GR, parts = np.column_stack([rewards_GR, speed_G.astype(np.float32)]), (*names, SPEED)
        if self._settings.diversity_weight:
            apart_G = np.array(distances_to_others(completion_texts(self._engine.tokenizer, group)), np.float32)
            rewards_GR = np.column_stack([rewards_GR, np.float32(self._settings.diversity_weight) * apart_G])
            parts = (*parts, DIVERSITY)
        graded = dataclasses.replace(
            group,
            rewards=rewards_GR,
            reward_names=parts,
            correct=correct_G,
            actor_id=self._actor_id,
            counters={**group.counters, **counters},
            **_branch_grades(group, grades, names, beside=len(parts) - len(names)),
        )
        graded.validate()
        return graded


@dataclass(frozen=True)
class _Asked:
    """Of a row: the verdicts that are out, one for each text that differs, and which of them each of its texts has, the
    completion's first, then those of its branches."""

    futures: list[Future[GradeResult]]
    of_text: list[int]


@dataclass(frozen=True)
class _Grades:
    """What a row's ``_Asked`` got."""

    verdicts: list[GradeResult]
    of_text: list[int]

    @property
    def completion(self) -> GradeResult:
        return self.verdicts[0]

    @property
    def branches(self) -> list[GradeResult]:
        return [self.verdicts[number] for number in self.of_text[1:]]


def _rewards(grades: Sequence[GradeResult], names: Sequence[str]) -> np.ndarray:
    """[., R] float32."""
    values = [[grade.components[name] for name in names] for grade in grades]
    return np.array(values, dtype=np.float32).reshape(len(grades), len(names))


def _branch_grades(
    group: TrajectoryGroup, rows: Sequence[_Grades], names: Sequence[str], *, beside: int
) -> dict[str, Any]:
    """The fields of the group that hold the grades of its branches, 0 for states that a completion never reached and in
    the ``beside`` last parts of a reward, which the task doesn't give."""
    if group.branch_ids is None or group.branch_step is None:
        return {}
    grades = [grade for row in rows for grade in row.branches]
    shape = group.branch_ids.shape[:3]
    rewards, correct = np.zeros((*shape, len(names) + beside), np.float32), np.zeros(shape, np.bool_)
    at = np.broadcast_to((group.branch_step >= 0)[:, :, None], shape)
    rewards[at, : len(names)], correct[at] = _rewards(grades, names), [grade.correct for grade in grades]
    return {"branch_rewards": rewards, "branch_correct": correct}


def _faults(grades: Iterable[GradeResult]) -> tuple[GradingFault, ...]:
    return tuple(grade.fault for grade in grades if grade.fault is not None)


def _report(group: TrajectoryGroup, rows: Sequence[_Grades]) -> GroupReport:
    grades = [grade for row in rows for grade in row.verdicts]
    return GroupReport(
        group_id=group.group_id,
        problem_id=group.problem_id,
        tokens=int(group.drawn.sum()),
        steps=int(group.nfe.sum()),
        verdicts=len(grades),
        failures=sum(grade.failed for grade in grades),
        invalid=next((grade.invalid for grade in grades if grade.invalid is not None), None),
        faults=_faults(grades),
        digest=content_digest(group),
    )
