"""The controller: one process that plans, leases, learns, publishes, evaluates, checkpoints and reports.

An iteration i (from 0) trains on its own groups at learner version i, whatever the mode. Synchronous runs
(``rollout.max_staleness`` 0) lease its groups only after version i was published. Asynchronous ones lease up to
``max_staleness`` iterations ahead, so that actors write while the ranks learn; how stale a group may become is then
bounded by construction, and checked again when it is consumed.
"""

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray

from learner.control.commands import Commands
from learner.control.opening import BegunRun
from learner.control.subject import Grounds
from learner.control.training import Training
from learner.control.update_metrics import update_metrics
from learner.evaluation.intervals import has_fallen
from learner.objectives import make_objective
from learner.objectives.base import FinalCredit
from learner.objectives.rewards import seen_rewards
from learner.objectives.statistics import Statistics
from learner.ranks.group import GroupState, LearnerGroup, group_state, reserve_ranks
from learner.ranks.one_process import OneProcessPool
from learner.ranks.plan import plan_update
from learner.ranks.rank import PublishedAdapter, UpdateReport, lora_spec
from learner.reporting.playback import PlaybackRecorder
from learner.reporting.reporter import PROBLEMS
from learner.runs import checkpoint as checkpoints
from learner.runs.stopping import StopFlag
from learner.settings.forwards import forward_equivalents
from learner.settings.run import RunConfig
from learner.supply.actor_count import ActorCount
from learner.supply.actors import start_actors
from learner.supply.feed import Feed
from learner.supply.greedy import greedy_solve_rates
from learner.supply.publish import publish
from learner.supply.pumping import Answer, pump_until
from learner.supply.window import Supply
from rewards.errors import WaitTimeout, first_line
from rollout.adapters import AdapterState, digest
from rollout.ledger import Ledger
from rollout.messages import BASE_WEIGHTS, GroupRef, Weights
from rollout.replay import ReplayBuffer, ReplayItem
from rollout.trajectory import TrajectoryGroup
from rollout.waits import bounded_get


class Controller(Training):
    """A run of reinforcement learning, from its first lease to its summary."""

    config: RunConfig
    actors: ActorCount

    def __init__(
        self,
        config: RunConfig,
        begun: BegunRun,
        grounds: Grounds,
        stop: StopFlag,
        commands: Commands,
        closing: contextlib.ExitStack,
    ) -> None:
        super().__init__(
            config,
            begun,
            stop,
            commands,
            identity=grounds.identity,
            iterations=config.run.iterations,
            evaluate_every=config.evaluation.every,
        )
        subject, model_path, resumed = grounds.subject, grounds.model_path, begun.resumed
        self.task, self.held_out = subject.task, subject.held_out
        self.eos_ids = (grounds.family.eos_token_id,)
        self.recorder = PlaybackRecorder(
            begun.reporter,
            grounds.tokenizer,
            completions=config.samples_per_iteration,
            task=subject.task,
            train=subject.train,
            held_out=subject.held_out,
        )
        rollout = config.rollout
        self.phases = config.objective.phases()
        supply = Supply(rollout.prompts_per_iteration, self.phases)
        ledger = Ledger(
            capacity=max(rollout.buffer_size, supply.largest),
            groups_per_lease=rollout.groups_per_lease,
            max_staleness=rollout.max_staleness,
        )
        if resumed is not None:
            ledger.restore(resumed.progress.ledger)
        self._model_path, self._first_adapter = model_path, subject.adapter
        placement, together = reserve_ranks(config, self._enforce_stop), config.resources.one_process
        self._placement = None if together else placement
        self._hosts: list[Any] | None = None
        """the processes of ranks that are actors too"""
        of_pool = placement if together else None
        pool = start_actors(config, model_path, lora_spec(config), seed=config.run.seed, placement=of_pool)
        closing.callback(pool.close)
        self.workers.pool = pool
        self.actors = ActorCount(config, pool)
        self.feed = Feed(
            config,
            subject.train,
            pool,
            ReplayBuffer(ledger),
            supply,
            on_fault=begun.reporter.fault,
            stop=stop.is_set,
            on_pump=self._attend,
        )
        self.learner = self._start_ranks(group_state(resumed) if resumed is not None else None)
        closing.callback(lambda: self.learner.close())
        self.workers.learner = self.learner
        pool.wait_ready(self._watch)
        self._take_state()
        if self.phases is not None and resumed is not None:
            supply.restore(resumed.buffer)
            teacher = resumed.phase["teacher"]
            drawing = dataclasses.replace(self.adapter, state=teacher, digest=digest(teacher))
            self.weights = publish(self.progress.iteration, drawing)
        self._publish(self.progress.iteration, self.adapter)

    def rest(self) -> bool:
        """Take in what is being drawn, and lease nothing. True when nothing is being drawn any more."""
        self.feed.take_in(timeout_s=0.0)
        super().rest()
        return self.feed.replay.ledger.counts()["leased"] == 0

    def tell_last_faults(self) -> None:
        self.feed.tell_last_faults()

    def finish(self) -> dict[str, Any]:
        """Leave adapter, summary and plots behind; returns the summary."""
        figures = {
            **{name: {"greedy": rates} for name, rates in self.progress.evaluations.items()},
            "task": self.task.name,
            "held_out_problems": len(self.held_out),
        }
        return self._leave(self.adapter.state, self.adapter.peft_config, figures)

    def gradient(self, number: int) -> AdapterState:
        """Of a batch of its own under the weights that the run begins with, whose step is not taken; of a method that
        updates several times on a batch, the first update's. ``number``: of the batch, from 0, in order."""
        self._publish(number, self.adapter)
        self.feed.issue_through(number)
        items = self.feed.gather(number, self.weights)
        gradient = self._meanwhile(partial(self.learner.gradient, self.feed.learned_from(number, items), 0))
        self.feed.replay.commit(items, number)
        return gradient

    def dry_run(self) -> None:
        """Print two rollouts of the first iteration and the batch's statistics."""
        self.feed.issue_through(0)
        items = self.feed.gather(0, self.weights)
        groups = self._groups([item.ref.outline for item in items])
        for group in groups[:2]:
            print(
                f"\nproblem {group.problem_id}\nprompt: {self.recorder.prompt(group)!r}\n"
                f"completion: {self.recorder.text(group, 0)!r}"
            )
            rewards = ", ".join(f"{n} {v:.3f}" for n, v in zip(group.reward_names, group.rewards[0], strict=True))
            print(f"right: {bool(group.correct[0])}; reward {group.rewards[0].sum():.3f} ({rewards})")
        objective = make_objective(self.config.objective)
        seen = [seen_rewards(group, self.config.reward) for group in groups]
        plan = plan_update(
            groups,
            objective=objective,
            run_seed=self.config.run.seed,
            update_index=0,
            eos_ids=self.eos_ids,
            ranks=self.config.learner.ranks,
            views_per_forward=self.config.learner.views_per_forward,
            final=FinalCredit(objective.credit(seen), Statistics()),
        )
        print(f"\nfirst batch ({len(groups)} groups of {groups[0].size}):")
        for name, value in plan.statistics.items():
            print(f"  {name:<32}{value:>12.5g}")

    def _ledger(self) -> dict[str, Any]:
        return self.feed.replay.ledger.state()

    def _buffer(self) -> Sequence[TrajectoryGroup]:
        return () if self.phases is None else self._groups([ref.whole for ref in self.feed.held()])

    def _start_ranks(self, state: GroupState | None) -> LearnerGroup:
        placement, self._placement = self._placement, None
        if isinstance(pool := self.workers.pool, OneProcessPool):
            pool.renew(self._hosts or ())
            pool.wait_ready(self._watch)
            self._hosts = pool.hosts()
        adapter, shards = (self._first_adapter, None) if state is None else (state.adapter.state, state.shards)
        learner = LearnerGroup(
            self.config,
            self._model_path,
            adapter=adapter,
            shards=shards,
            on_tick=self._watch,
            placement=placement,
            hosts=self._hosts,
        )
        if self.phases is not None:
            learner.enter_phase(self.phases.of(self.progress.iteration), state.phase if state is not None else None)
        return learner

    def _evaluate_base(self) -> None:
        """Solve rates of the bare base, without adapter, once per run."""
        if "base" not in self.progress.evaluations:
            self._evaluate("base", BASE_WEIGHTS, iteration=0)

    def _iterate(self, iteration: int) -> None:
        """Gather, learn, publish, commit, report."""
        begin = time.monotonic()
        self.feed.issue_through(iteration + self.config.rollout.max_staleness)
        items = self.feed.gather(iteration, self.weights)
        gathered = time.monotonic()
        refs = self.feed.learned_from(iteration, items)
        reports = [self._update(refs, iteration, index) for index in range(self.config.learner.updates_per_batch)]
        updated = time.monotonic()
        version = iteration + 1
        if self.phases is not None and self.phases.begin(version) == version:
            self.learner.enter_phase(self.phases.of(version))
        state = self._meanwhile(partial(self.learner.commit, on_tick=self._enforce_stop))
        self.feed.replay.commit(items, self.weights.version)
        self._publish(version, state.adapter)
        seconds = {
            "rollout_wait": gathered - begin,
            "update": updated - gathered,
            "publish": time.monotonic() - updated,
        }
        total = time.monotonic() - begin
        metrics = {
            **self._metrics(iteration, items, reports),
            **self.workers.gpu_peaks(),
            **{f"time/{name}_s": value for name, value in seconds.items()},
            "time/iteration_s": total,
            **{f"time/lease/{stage}_s": value for stage, value in self.feed.lease_seconds().items()},
            "machine/tokens_per_s": sum(item.report.tokens for item in items) / total,
            "forward_equivalents": forward_equivalents(
                self.config,
                steps=sum(item.report.steps for item in items),
                completions=reports[0].plan_statistics["completions"],
                views=[report.plan_statistics["views"] for report in reports],
            ),
        }
        self._advance(reports, total, state)
        # What the new version allows is drawn while the controller reports.
        self.feed.issue_through(version + self.config.rollout.max_staleness)
        self.feed.pump(self.weights, timeout_s=0.0)
        self.reporter.iteration(version, metrics)
        self._record(version, refs, reports)
        self.workers.tell(version)
        self._check_agreement(version, items, reports)
        self._check_finite(reports)

    def _record(self, iteration: int, refs: Sequence[GroupRef], reports: Sequence[UpdateReport]) -> None:
        """Keep completions for playback, which isn't worth a run: none of groups that are gone. The outlines of all are
        fetched, since the map of their orders is of all."""
        if not self.config.samples_per_iteration:
            return
        try:
            groups = self._meanwhile(partial(self._groups, [ref.outline for ref in refs]))
        except (ray.exceptions.ObjectLostError, WaitTimeout) as error:
            text = f"no completions of iteration {iteration} are kept for playback: {first_line(error)}"
            self.reporter.fault("objects", "lost", text)
            return
        self.recorder.iteration(iteration, groups, reports[0].credit, [report.scored for report in reports])

    def _publish(self, version: int, adapter: PublishedAdapter) -> None:
        """To evaluations the newest weights, to rollouts those that the method draws with: in a phase, those that it
        began with, under the new version."""
        self.trained = publish(version, adapter)
        begins = self.phases is None or self.phases.begin(version) == version
        self.weights = self.trained if begins else self.weights._replace(version=version)

    def _update(self, refs: Sequence[Any], iteration: int, index: int) -> UpdateReport:
        """One optimizer step. The learning rate's schedule is that of the run, or of each phase."""
        per_batch, iterations, begin = self.config.learner.updates_per_batch, self.config.run.iterations, 0
        if self.phases is not None:
            iterations, begin = self.phases.iterations, self.phases.begin(iteration)
        number = (iteration - begin) * per_batch + index
        lr = self._learning_rate(number, iterations * per_batch)
        index = index if self.phases is None else number
        return self._meanwhile(partial(self.learner.update, refs, index, lr, on_tick=self._enforce_stop))

    def _meanwhile(self, work: Callable[[], Answer]) -> Answer:
        """What the ranks, or a node, answer; until then the actors are kept busy with what may be drawn ahead."""
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            return pump_until(thread.submit(work), partial(self.feed.pump, self.weights, timeout_s=0.0))

    def _metrics(
        self, iteration: int, items: Sequence[ReplayItem], reports: Sequence[UpdateReport]
    ) -> dict[str, float]:
        staleness = [item.staleness for item in items]
        counts = self.feed.replay.ledger.counts()
        states = ("issued", "pending", "leased", "ready", "consumed", "dropped")
        recoveries = {name: value for name, value in counts.items() if name not in (*states, "dropped_by_reason")}
        metrics = {
            **update_metrics(reports),
            "staleness/mean": sum(staleness) / len(staleness),
            "staleness/max": float(max(staleness)),
            **{f"ledger/{name}": float(counts[name]) for name in states},
            **{f"ledger/dropped/{reason}": float(n) for reason, n in counts["dropped_by_reason"].items()},
            # Recoveries depend on what went wrong on the machine, not on the run: a repeated run needn't have them.
            **{f"machine/ledger_{name}": float(value) for name, value in recoveries.items()},
            "machine/grader_failures": float(self.feed.grader_failures),
        }
        return {**metrics, **unupdated_metrics(reports[0].statistics)} if max(staleness) == 0 else metrics

    def _check_agreement(self, iteration: int, items: Sequence[ReplayItem], reports: Sequence[UpdateReport]) -> None:
        unupdated = reports[0].statistics.maxima.get("log_ratio/abs_max", 0.0)
        alarm = self.config.learner.log_ratio_alarm
        if unupdated > alarm and max(item.staleness for item in items) == 0:
            self.reporter.event(
                "warning",
                "log_ratio",
                f"iteration {iteration}: learner and rollout disagree about un-updated weights by up to "
                f"{unupdated:.2g} nats (learner.log_ratio_alarm={alarm:g}); their dtype or kernels differ",
            )

    def _evaluate_trained(self, iteration: int) -> None:
        self._evaluate("trained", self.trained, iteration=iteration)

    def _evaluate(self, name: str, weights: Weights, *, iteration: int) -> None:
        rates, kept = greedy_solve_rates(self.config, self.feed, self.held_out, weights, on_tick=self._tick)
        better = rates["m"] > self.progress.best.get("solve_rate", -1.0)
        before = self.progress.evaluations.get(name, {}).get("m", 1.0)
        metrics = {f"eval/{steps}/solve_rate": rate for steps, rate in rates.items()}
        metrics[PROBLEMS] = float(len(self.held_out))
        self._evaluated(name, iteration, rates, metrics=metrics, best={"solve_rate": rates["m"]} if better else None)
        self._tell_fall(rates["m"], before)
        self.recorder.evaluation(iteration, name, kept)

    def _tell_fall(self, rate: float, before: float) -> None:
        """Warn when held-out falls below its best; ``before``: the rate of the evaluation before, which may have told
        so already."""
        best, problems = self.progress.best, len(self.held_out)
        fallen, told = (has_fallen(each, best["solve_rate"], problems) for each in (rate, before))
        if not fallen or told:
            return
        at = best["iteration"]
        where = checkpoints.place(self.run_dir.checkpoints_dir, at) if at else "the base"
        text = (
            f"held-out solve rate {rate:.3f}: below its best ({best['solve_rate']:.3f} after iteration {at}, {where}) "
            "by more than twice its standard error: what is learned now makes it worse; lower learner.lr"
        )
        self.reporter.event("warning", "fell", text, rate=rate, best=best["solve_rate"], best_iteration=at)

    def _groups(self, refs: Sequence[ray.ObjectRef[TrajectoryGroup]]) -> list[TrajectoryGroup]:
        limit = self.config.timeouts.publish
        return bounded_get(refs, who="the replay buffer's objects", timeout_s=limit)


def unupdated_metrics(first: Statistics) -> dict[str, float]:
    """How far learner and rollout disagree about the same weights, by the first update of batches that these drew.

    Args:
        first: the figures of that update. Of a method without a clipped ratio there is no share beyond the clip.
    """
    metrics = {"log_ratio/unupdated_abs_max": first.maxima.get("log_ratio/abs_max", 0.0)}
    if "ratio/beyond_clip" in (figures := first.values()):
        metrics["ratio/unupdated_beyond_clip"] = figures["ratio/beyond_clip"]
    return metrics
