"""A fine-tuning run, from its data to its adapter: the counterpart of ``learner.controller``.

An iteration is an optimizer update. Update i learns from the examples i*batch to (i+1)*batch of an endless row of
epochs, each the demonstrations in an order drawn from the seed; nothing of that has a state, so a run that is resumed
at a checkpoint goes on with the same bits.
"""

import contextlib
import dataclasses
import json
import time
from functools import partial
from typing import Any

import ray

from learner import checkpoint as checkpoints
from learner.atomic import atomic_dir, atomic_write_text
from learner.config import in_ray_job, refuse_relative
from learner.dashboard import dashboard
from learner.finetuning.data import Demonstrations, load_demonstrations
from learner.finetuning.rank import SftGroup, UpdateBatch
from learner.finetuning.settings import SftConfig, check_resources, file_settings
from learner.lifecycle import reporting, see_through, told_failures
from learner.optim import learning_rate
from learner.plots import plot_run
from learner.rank import UpdateReport
from learner.reporting import Reporter
from learner.rundir import RunDirectory
from learner.runs import check_quantization, open_run, starting_adapter
from learner.session import joined_ray
from learner.stopping import StopFlag, StopRequested
from rewards.errors import CheckpointError, ConfigError, TrainingDiverged
from rollout.actor import code_identity
from rollout.adapters import write_peft_folder
from rollout.models import load_tokenizer, policy_adapter
from rollout.seeds import numpy_generator


def run(config: SftConfig) -> int:
    """Fine-tune as the settings say and return the process's exit status: 0, or 128 + signal when asked to stop.

    Raises:
        UnmaskError: whatever ends the run; the run directory then says ``failed``.
    """
    if in_ray_job():
        refuse_relative(file_settings(config))
    check_quantization(config.model, config.learner, config.resources)
    code_identity()
    assert config.model.path is not None
    data = _data(config, config.model.path)
    updates = total_updates(config, data)
    with contextlib.ExitStack() as stack:
        run_dir, resumed = open_run(config.run, kind="sft", label="sft")
        stack.enter_context(run_dir)
        _same_data(run_dir, data, resumed)
        told = reporting(
            config,
            run_dir,
            resumed,
            task="sft",
            objective="sft",
            iterations=updates,
            trackers=config.trackers,
            place=config.store,
        )
        reporter = stack.enter_context(told)
        if config.run.dashboard:
            stack.enter_context(dashboard(run_dir, reporter))
        return _train(config, run_dir, reporter, resumed, data)


def total_updates(config: SftConfig, data: Demonstrations) -> int:
    """Optimizer updates of the run: whole batches only; the last epoch's remainder is left out."""
    return max(1, config.sft.epochs * len(data.train) // config.sft.batch)


def update_batch(data: Demonstrations, *, seed: int, batch: int, number: int) -> UpdateBatch:
    """What update ``number`` (from 0) learns from."""
    places = range(number * batch, (number + 1) * batch)
    epochs = tuple(place // len(data.train) for place in places)
    orders = {epoch: numpy_generator(seed, "sft", "order", epoch).permutation(len(data.train)) for epoch in set(epochs)}
    chosen = [orders[place // len(data.train)][place % len(data.train)] for place in places]
    return UpdateBatch(tuple(data.train[int(i)] for i in chosen), epochs)


class Finetuning:
    """One run; ``learner.lifecycle`` calls its phases in turn."""

    def __init__(
        self,
        config: SftConfig,
        run_dir: RunDirectory,
        reporter: Reporter,
        data: Demonstrations,
        resumed: checkpoints.Checkpoint | None,
        stop: StopFlag,
        closing: contextlib.ExitStack,
    ) -> None:
        assert config.model.path is not None
        self.config, self.run_dir, self.reporter, self.data, self._stop = config, run_dir, reporter, data, stop
        self.updates = total_updates(config, data)
        layout = checkpoints.layout_of(config.learner)
        if resumed is not None:
            checkpoints.require_layout(resumed.progress, layout)
        self.learner = SftGroup(
            config,
            config.model.path,
            adapter=resumed.adapter if resumed is not None else starting_adapter(config.lora),
            shards=resumed.shards if resumed is not None else None,
            on_tick=partial(stop.enforce, config.timeouts.stop),
        )
        closing.callback(self.learner.close)
        self.progress = resumed.progress if resumed is not None else checkpoints.Progress.before_the_first(layout)
        self.saved = self.progress if resumed is not None else None
        self.adapter = self.learner.publish()
        if resumed is not None:
            checkpoints.require_adapter(resumed.progress, self.adapter.digest)
        self._held_out = [ray.put(data.held_out)] if data.held_out else []
        for rank in self.learner.descriptions:
            reporter.store.worker(
                f"learner-{rank['rank']}", role="learner", status="ready", node=rank["host"], pid=rank["pid"]
            )

    def evaluate_base(self) -> None:
        """Held-out loss of what the run starts from, once per run."""
        if "base" not in self.progress.evaluations:
            self._evaluate("base", iteration=0)

    def train(self) -> None:
        """All remaining updates. Raises StopRequested when the run is asked to stop."""
        self._evaluate_and_save()  # a run that was stopped in an evaluation makes up for it
        while self.progress.iteration < self.updates:
            if self._stop.is_set():
                raise StopRequested
            self._iterate(self.progress.iteration)
            self._evaluate_and_save()

    def checkpoint(self) -> None:
        """Save where the run stands, if it has moved since the last time and its ranks are there to hand it over."""
        if self.progress == self.saved or self.learner.closed:
            return
        self.reporter.flush()
        self.adapter = self.learner.publish()
        self.progress = dataclasses.replace(self.progress, adapter_digest=self.adapter.digest)
        saved = checkpoints.Checkpoint(
            self.progress, self.adapter.state, self.adapter.peft_config, self.learner.export()
        )
        path = checkpoints.save(self.run_dir.checkpoints_dir, saved)
        best = self.progress.best.get("iteration")
        checkpoints.prune(self.run_dir.checkpoints_dir, keep=self.config.checkpoint.keep, best_iteration=best)
        self.saved = self.progress
        self.reporter.store.checkpoint(self.progress.iteration, str(path), {"adapter_digest": self.adapter.digest})

    def finish(self) -> dict[str, Any]:
        """Leave adapter, summary and plots behind; returns the summary."""
        state, peft_config = self.adapter.state, self.adapter.peft_config
        iteration = self.saved.iteration if self.saved is not None else 0
        best = self.progress.best.get("iteration")
        if self.config.sft.adapter == "best" and best:
            found = checkpoints.load(checkpoints.place(self.run_dir.checkpoints_dir, best))
            state, peft_config, iteration = dict(found.adapter), found.peft_config, best
        with atomic_dir(self.run_dir.adapter_dir) as folder:
            write_peft_folder(folder, state, peft_config)
        summary = {
            **{name: {"held_out": figures} for name, figures in self.progress.evaluations.items()},
            "best": self.progress.best,
            "adapter_of_iteration": iteration,
            "iterations": self.progress.iteration,
            "train_seconds": self.progress.train_seconds,
            "task": "sft",
            "seed": self.config.run.seed,
            "demonstrations": len(self.data.train),
            "held_out_demonstrations": len(self.data.held_out),
        }
        self.run_dir.write_summary(summary)
        self.reporter.flush()
        plot_run(self.run_dir.path)
        return summary

    def _evaluate_and_save(self) -> None:
        done, every = self.progress.iteration, self.config.sft.evaluate_every
        last = done == self.updates
        if done > self.progress.evaluated_at and (last or (every and done % every == 0)):
            self._evaluate("trained", iteration=done)
        best = self.progress.best.get("iteration") == done
        if done and (last or best or done % self.config.checkpoint.every == 0):
            self.checkpoint()

    def _iterate(self, number: int) -> None:
        """Learn and report."""
        begin = time.monotonic()
        report = self._update(number)
        total = time.monotonic() - begin
        tokens = report.plan_statistics["tokens"]
        self.progress = dataclasses.replace(
            self.progress,
            iteration=number + 1,
            policy_version=number + 1,
            updates=self.progress.updates + report.applied,
            nonfinite_in_a_row=0 if report.applied else self.progress.nonfinite_in_a_row + 1,
            train_seconds=self.progress.train_seconds + total,
        )
        metrics = {
            **report.plan_statistics,
            **report.statistics.values(),
            "loss": report.loss,
            "epoch": (number + 1) * self.config.sft.batch / len(self.data.train),
            "grad_norm": report.grad_norm,
            "lr": report.learning_rate,
            "updates/applied": float(report.applied),
            "updates/forwards": float(report.forwards),
            "time/iteration_s": total,
            "machine/tokens_per_s": tokens / total,
        }
        self.reporter.iteration(number + 1, metrics)
        self._check_health(number + 1, report)

    def _update(self, number: int) -> UpdateReport:
        learner, sft = self.config.learner, self.config.sft
        batch = update_batch(self.data, seed=self.config.run.seed, batch=sft.batch, number=number)
        lr = learning_rate(
            number, self.updates, peak=learner.lr, schedule=learner.lr_schedule, warmup_fraction=learner.warmup_fraction
        )
        return self.learner.update([ray.put(batch)], number, lr)

    def _check_health(self, iteration: int, report: UpdateReport) -> None:
        if report.applied:
            return
        self.reporter.event(
            "warning", "nonfinite", f"iteration {iteration}: update skipped, gradient norm {report.grad_norm}"
        )
        if self.progress.nonfinite_in_a_row >= self.config.learner.max_nonfinite:
            raise TrainingDiverged(
                f"{self.progress.nonfinite_in_a_row} updates in a row had a gradient that isn't finite "
                f"(iteration {iteration}); lower learner.lr, or go on from an earlier checkpoint "
                f"in {self.run_dir.checkpoints_dir}"
            )

    def _evaluate(self, name: str, *, iteration: int) -> None:
        if not self._held_out:
            return
        figures = self.learner.held_out(self._held_out)
        best = self.progress.best
        if iteration and figures["held_out/loss"] < best.get("loss", float("inf")):
            best = {"iteration": iteration, "loss": figures["held_out/loss"]}
        evaluations = {**self.progress.evaluations, name: figures}
        self.progress = dataclasses.replace(self.progress, evaluations=evaluations, evaluated_at=iteration, best=best)
        self.reporter.evaluation(iteration, figures)


def _train(
    config: SftConfig,
    run_dir: RunDirectory,
    reporter: Reporter,
    resumed: checkpoints.Checkpoint | None,
    data: Demonstrations,
) -> int:
    with told_failures(reporter), contextlib.ExitStack() as closing:
        cpus = config.learner.ranks * config.resources.cpus_per_rank
        session = joined_ray(config.resources.ray_address, cpus, partial(check_resources, config))
        told = closing.enter_context(session)
        stop = closing.enter_context(StopFlag())
        reporter.event("info", "start", f"run {run_dir.id}: {told}; model {config.model.path}")
        for sentence in data.told:
            reporter.event("warning", "data", sentence)
        updates = total_updates(config, data)
        counted = f"{len(data.train)} demonstrations to learn, {len(data.held_out)} held out"
        reporter.event("info", "data", f"{counted}; {updates} updates of {config.sft.batch}")
        try:
            finetuning = Finetuning(config, run_dir, reporter, data, resumed, stop, closing)
        except StopRequested:
            reporter.event("info", "stop", f"asked to stop by {stop.name} while the ranks were starting")
            reporter.store.status("stopped")
            return stop.exit_status
        summary = see_through(finetuning, reporter, stop)
        if summary is None:
            return stop.exit_status
        reporter.event("info", "end", _closing_words(summary, run_dir))
        return 0


def _closing_words(summary: dict[str, Any], run_dir: RunDirectory) -> str:
    where = f"the adapter after {summary['adapter_of_iteration']} updates is in {run_dir.adapter_dir}"
    if "trained" not in summary:
        return where
    before, after = (summary[name]["held_out"]["held_out/loss"] for name in ("base", "trained"))
    return f"held-out loss {before:.4f} at the start, {after:.4f} at the end; {where}"


def _data(config: SftConfig, model_path: str) -> Demonstrations:
    family = policy_adapter(model_path)
    if family.max_length is not None and config.data.max_tokens > family.max_length:
        raise ConfigError(
            f"data.max_tokens={config.data.max_tokens} is more than {model_path} can take; "
            f"lower it to {family.max_length}"
        )
    return load_demonstrations(
        config.data, load_tokenizer(model_path), mask_token_id=family.mask_token_id, seed=config.run.seed
    )


def _same_data(run_dir: RunDirectory, data: Demonstrations, resumed: checkpoints.Checkpoint | None) -> None:
    """Note what the run learns from, or refuse to go on with something else."""
    path = run_dir.path / "data.json"
    if resumed is None:
        about = {"demonstrations": len(data.train), "held_out": len(data.held_out), "sha256": data.fingerprint}
        atomic_write_text(path, json.dumps(about, indent=2) + "\n")
        return
    try:
        before = json.loads(path.read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}, which names the run's demonstrations, can't be read: {error}") from error
    if before != data.fingerprint:
        raise CheckpointError(
            f"the demonstrations are not those that {run_dir.path} was started with (or they are encoded or split "
            "otherwise); restore them, or start a new run with lora.adapter=<checkpoint>/adapter"
        )
