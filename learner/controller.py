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
from collections.abc import Sequence
from functools import partial
from typing import Any

from learner import checkpoint as checkpoints
from learner.actors import start_actors
from learner.atomic import atomic_dir
from learner.commands import Commands
from learner.config import RunConfig
from learner.evaluation.greedy import greedy_solve_rates
from learner.feed import Feed
from learner.group import LearnerGroup, reserve_ranks
from learner.objectives import Statistics, make_objective
from learner.optim import learning_rate
from learner.playback import PlaybackRecorder
from learner.plots import plot_run
from learner.rank import UpdateReport, lora_spec
from learner.reporting import Reporter
from learner.rundir import RunDirectory
from learner.runs import check_lengths, starting_adapter, task_problems
from learner.stopping import StopFlag, StopRequested
from learner.update_plan import plan_update
from learner.weights import publish
from rewards.errors import TrainingDiverged
from rewards.task import get_task
from rollout.actor import BASE_WEIGHTS, Weights
from rollout.adapters import write_peft_folder
from rollout.ledger import Ledger
from rollout.models import load_tokenizer, policy_adapter
from rollout.replay import ReplayBuffer, ReplayItem
from rollout.trajectory import TrajectoryGroup
from rollout.waits import bounded_get

_WORKERS_S = 10.0
_REST_S = 0.2


class Controller:
    """One run, from its first lease to its summary; ``learner.launch`` calls its phases in turn."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDirectory,
        reporter: Reporter,
        model_path: str,
        resumed: checkpoints.Checkpoint | None,
        stop: StopFlag,
        commands: Commands,
        closing: contextlib.ExitStack,
    ) -> None:
        self.config, self.run_dir, self.reporter = config, run_dir, reporter
        self._on_tick = partial(stop.enforce, config.timeouts.stop)
        self._stop, self._commands = stop, commands
        self._workers: dict[str, dict[str, Any]] = {}  # the actors as they were told last
        self.task = get_task(config.task.name)
        family = policy_adapter(model_path)
        self.eos_ids = (family.eos_token_id,)
        tokenizer = load_tokenizer(model_path)
        self.recorder = PlaybackRecorder(reporter, tokenizer, completions=config.samples_per_iteration)
        train, self.held_out = task_problems(config, self.task, on_event=reporter.event)
        rollout = config.rollout
        check_lengths(
            [*train, *self.held_out],
            self.task,
            tokenizer,
            completion_length=rollout.sampler.completion_length,
            longest=family.max_length,
        )
        ledger = Ledger(
            capacity=rollout.buffer_size,
            groups_per_lease=rollout.groups_per_lease,
            max_staleness=rollout.max_staleness,
        )
        layout = checkpoints.layout_of(config.learner)
        if resumed is not None:
            checkpoints.require_layout(resumed.progress, layout)
            ledger.restore(resumed.progress.ledger)
        placement = reserve_ranks(config)
        pool = start_actors(config, model_path, lora_spec(config), seed=config.run.seed)
        closing.callback(pool.close)
        self.feed = Feed(
            config,
            train,
            pool,
            ReplayBuffer(ledger),
            on_event=reporter.event,
            stop=stop.is_set,
            on_pump=partial(commands.tick, pool),
        )
        adapter = resumed.adapter if resumed is not None else starting_adapter(config.lora)
        shards = resumed.shards if resumed is not None else None
        self.learner = LearnerGroup(
            config, model_path, adapter=adapter, shards=shards, on_tick=self._on_tick, placement=placement
        )
        closing.callback(self.learner.close)
        pool.wait_ready(self._on_tick)
        self.progress = resumed.progress if resumed is not None else checkpoints.Progress.before_the_first(layout)
        self.saved = self.progress if resumed is not None else None
        self.adapter = self.learner.publish()
        if resumed is not None:
            checkpoints.require_adapter(resumed.progress, self.adapter.digest)
        self.weights = publish(self.progress.iteration, self.adapter)
        self._report_workers()

    def evaluate_base(self) -> None:
        """Solve rates of the bare base, without adapter, once per run."""
        if "base" not in self.progress.evaluations:
            self._evaluate("base", BASE_WEIGHTS, iteration=0)

    def train(self) -> None:
        """All remaining iterations. Raises StopRequested in the middle of one when the run is asked to stop."""
        self._evaluate_and_save()  # a run that was stopped in an evaluation makes up for it
        while self.progress.iteration < self.config.run.iterations:
            self._commands.between_iterations(self.progress.iteration, self, self.feed.pool)
            self._iterate(self.progress.iteration)
            self._evaluate_and_save()

    def checkpoint(self) -> None:
        """Save where the run stands, if it has moved since the last time and its ranks are there to hand it over."""
        if self.progress == self.saved or self.learner.closed:
            return
        self.reporter.flush()
        progress = dataclasses.replace(self.progress, ledger=self.feed.replay.ledger.state())
        saved = checkpoints.Checkpoint(progress, self.adapter.state, self.adapter.peft_config, self.learner.export())
        path = checkpoints.save(self.run_dir.checkpoints_dir, saved)
        best = progress.best.get("iteration")
        checkpoints.prune(self.run_dir.checkpoints_dir, keep=self.config.checkpoint.keep, best_iteration=best)
        self.saved = self.progress
        self.reporter.store.checkpoint(progress.iteration, str(path), {"adapter_digest": self.adapter.digest})

    def rest(self) -> bool:
        """A moment of a pause: what is being drawn is taken in, nothing is leased. True when nothing is being drawn.

        Raises StopRequested when the run is asked to stop.
        """
        if self._stop.is_set():
            raise StopRequested
        self.feed.take_in(timeout_s=0.0)
        if time.monotonic() - self._workers_told > _WORKERS_S:
            self._report_workers()
        time.sleep(_REST_S)
        return self.feed.replay.ledger.counts()["leased"] == 0

    def finish(self) -> dict[str, Any]:
        """Leave adapter, summary and plots behind; returns the summary."""
        with atomic_dir(self.run_dir.adapter_dir) as folder:
            write_peft_folder(folder, self.adapter.state, self.adapter.peft_config)
        summary = {
            **{name: {"greedy": rates} for name, rates in self.progress.evaluations.items()},
            "best": self.progress.best,
            "iterations": self.progress.iteration,
            "train_seconds": self.progress.train_seconds,
            "task": self.task.name,
            "seed": self.config.run.seed,
            "held_out_problems": len(self.held_out),
        }
        self.run_dir.write_summary(summary)
        self.reporter.flush()
        plot_run(self.run_dir.path)
        return summary

    def dry_run(self) -> None:
        """Print two rollouts of the first iteration and the batch's statistics."""
        self.feed.issue_through(0)
        items = self.feed.gather(0, self.weights)
        groups = self._groups(items)
        for group in groups[:2]:
            print(
                f"\nproblem {group.problem_id}\nprompt: {self.recorder.prompt(group)!r}\n"
                f"completion: {self.recorder.text(group, 0)!r}"
            )
            rewards = ", ".join(f"{n} {v:.3f}" for n, v in zip(group.reward_names, group.rewards[0], strict=True))
            print(f"right: {bool(group.correct[0])}; reward {group.rewards[0].sum():.3f} ({rewards})")
        plan = plan_update(
            groups,
            objective=make_objective(self.config.objective),
            run_seed=self.config.run.seed,
            update_index=0,
            eos_ids=self.eos_ids,
            ranks=self.config.learner.ranks,
            views_per_forward=self.config.learner.views_per_forward,
        )
        print(f"\nfirst batch ({len(groups)} groups of {groups[0].size}):")
        for name, value in plan.statistics.items():
            print(f"  {name:<32}{value:>12.5g}")

    def _evaluate_and_save(self) -> None:
        """What is due between two iterations."""
        done, every = self.progress.iteration, self.config.evaluation.every
        last = done == self.config.run.iterations
        if done > self.progress.evaluated_at and (last or (every and done % every == 0)):
            self._evaluate("trained", self.weights, iteration=done)
        best = self.progress.best.get("iteration") == done
        if done and (last or best or done % self.config.checkpoint.every == 0):
            self.checkpoint()

    def _iterate(self, iteration: int) -> None:
        """Gather, learn, publish, commit, report."""
        begin = time.monotonic()
        self.feed.issue_through(iteration + self.config.rollout.max_staleness)
        items = self.feed.gather(iteration, self.weights)
        gathered = time.monotonic()
        refs = [item.ref for item in items]
        reports = [self._update(refs, iteration, index) for index in range(self.config.learner.updates_per_batch)]
        updated = time.monotonic()
        self.adapter = self.learner.publish()
        version = iteration + 1
        self.feed.replay.commit(items, self.weights.version)
        self.weights = publish(version, self.adapter)
        groups = self._groups(items)
        seconds = {
            "rollout_wait": gathered - begin,
            "update": updated - gathered,
            "publish": time.monotonic() - updated,
        }
        total = time.monotonic() - begin
        metrics = {
            **self._metrics(iteration, items, reports),
            **{f"time/{name}_s": value for name, value in seconds.items()},
            "time/iteration_s": total,
            "machine/tokens_per_s": sum(item.report.tokens for item in items) / total,
        }
        self.progress = dataclasses.replace(
            self.progress,
            iteration=version,
            policy_version=version,
            adapter_digest=self.adapter.digest,
            updates=self.progress.updates + sum(report.applied for report in reports),
            nonfinite_in_a_row=self._nonfinite_in_a_row(reports),
            train_seconds=self.progress.train_seconds + total,
        )
        self.reporter.iteration(version, metrics)
        self.recorder.iteration(version, groups, [report.scored for report in reports])
        self._report_workers()
        self._check_health(version, items, reports)

    def _update(self, refs: Sequence[Any], iteration: int, index: int) -> UpdateReport:
        """One optimizer step; meanwhile the actors are kept busy with what may be drawn ahead."""
        learner = self.config.learner
        number = iteration * learner.updates_per_batch + index
        total = self.config.run.iterations * learner.updates_per_batch
        lr = learning_rate(
            number, total, peak=learner.lr, schedule=learner.lr_schedule, warmup_fraction=learner.warmup_fraction
        )
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            update = thread.submit(self.learner.update, refs, index, lr)
            while not concurrent.futures.wait([update], timeout=0.05).done:
                self.feed.pump(self.weights, timeout_s=0.0)
            return update.result(timeout=0)

    def _metrics(
        self, iteration: int, items: Sequence[ReplayItem], reports: Sequence[UpdateReport]
    ) -> dict[str, float]:
        staleness = [item.staleness for item in items]
        counts = self.feed.replay.ledger.counts()
        states = ("issued", "pending", "leased", "ready", "consumed", "dropped")
        recoveries = {name: value for name, value in counts.items() if name not in (*states, "dropped_by_reason")}
        metrics = {
            **reports[0].plan_statistics,
            **Statistics.merged(report.statistics for report in reports).values(),
            "loss": sum(report.loss for report in reports) / len(reports),
            "grad_norm": reports[-1].grad_norm,
            "lr": reports[-1].learning_rate,
            "updates/applied": float(sum(report.applied for report in reports)),
            "updates/forwards": float(sum(report.forwards for report in reports)),
            "staleness/mean": sum(staleness) / len(staleness),
            "staleness/max": float(max(staleness)),
            **{f"ledger/{name}": float(counts[name]) for name in states},
            **{f"ledger/dropped/{reason}": float(n) for reason, n in counts["dropped_by_reason"].items()},
            # Recoveries depend on what went wrong on the machine, not on the run: a repeated run needn't have them.
            **{f"machine/ledger_{name}": float(value) for name, value in recoveries.items()},
            "machine/grader_failures": float(self.feed.grader_failures),
        }
        if max(staleness) == 0:
            metrics["log_ratio/unupdated_abs_max"] = reports[0].statistics.maxima.get("log_ratio/abs_max", 0.0)
        return metrics

    def _nonfinite_in_a_row(self, reports: Sequence[UpdateReport]) -> int:
        row = self.progress.nonfinite_in_a_row
        for report in reports:
            row = 0 if report.applied else row + 1
        return row

    def _check_health(self, iteration: int, items: Sequence[ReplayItem], reports: Sequence[UpdateReport]) -> None:
        unupdated = reports[0].statistics.maxima.get("log_ratio/abs_max", 0.0)
        alarm = self.config.learner.log_ratio_alarm
        if unupdated > alarm and max(item.staleness for item in items) == 0:
            self.reporter.event(
                "warning",
                "log_ratio",
                f"iteration {iteration}: learner and rollout disagree about un-updated weights by up to "
                f"{unupdated:.2g} nats (learner.log_ratio_alarm={alarm:g}); their dtype or kernels differ",
            )
        skipped = [report.grad_norm for report in reports if not report.applied]
        if skipped:
            self.reporter.event(
                "warning",
                "nonfinite",
                f"iteration {iteration}: {len(skipped)} updates skipped, gradient norm {skipped[-1]}",
            )
        if self.progress.nonfinite_in_a_row >= self.config.learner.max_nonfinite:
            raise TrainingDiverged(
                f"{self.progress.nonfinite_in_a_row} updates in a row had a gradient that isn't finite "
                f"(iteration {iteration}); lower learner.lr, or go on from an earlier checkpoint "
                f"in {self.run_dir.checkpoints_dir}"
            )

    def _evaluate(self, name: str, weights: Weights, *, iteration: int) -> None:
        rates, kept = greedy_solve_rates(self.config, self.feed, self.held_out, weights, on_tick=self._tick)
        evaluations = {**self.progress.evaluations, name: rates}
        best = self.progress.best
        if rates["m"] > best.get("solve_rate", -1.0):
            best = {"iteration": iteration, "solve_rate": rates["m"]}
        self.progress = dataclasses.replace(self.progress, evaluations=evaluations, evaluated_at=iteration, best=best)
        self.reporter.evaluation(iteration, {f"eval/{steps}/solve_rate": rate for steps, rate in rates.items()})
        self.recorder.evaluation(iteration, name, kept)

    def _groups(self, items: Sequence[ReplayItem]) -> list[TrajectoryGroup]:
        limit = self.config.timeouts.publish
        return bounded_get([item.ref for item in items], who="the replay buffer's objects", timeout_s=limit)

    def _tick(self) -> None:
        """Once a second of an evaluation."""
        self._on_tick()
        self._commands.tick(self.feed.pool)

    def _report_workers(self) -> None:
        self._workers_told = time.monotonic()
        store = self.reporter.store
        workers = {worker["actor_id"]: worker for worker in self.feed.pool.workers()}
        gone = {name: worker | {"state": "retired"} for name, worker in self._workers.items() if name not in workers}
        self._workers = workers
        for worker in [*workers.values(), *gone.values()]:
            store.worker(
                worker["actor_id"],
                role="rollout",
                status=worker["state"],
                node=str(worker["host"]),
                pid=worker["pid"],
                policy_version=worker["policy_version"],
                restarts=worker["restarts"],
                last_error=worker["last_error"],
                data={"node_id": worker["node_id"], "engine": worker["engine"], **(worker["usage"] or {})},
            )
        for rank in self.learner.descriptions:
            store.worker(
                f"learner-{rank['rank']}",
                role="learner",
                status="ready",
                node=rank["host"],
                pid=rank["pid"],
                policy_version=self.weights.version,
                data=rank.get("usage"),
            )
