"""A fine-tuning run, from its data to its adapter: the counterpart of ``learner.control.controller``.

An iteration is an optimizer update. Update i learns from the examples i*batch to (i+1)*batch of an endless row of
epochs, each the demonstrations in an order drawn from the seed; nothing of that has a state, so a run that is resumed
at a checkpoint goes on with the same bits.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from learner.control.commands import Commands
from learner.control.lifecycle import see_through
from learner.control.opening import About, BegunRun, FoundRun, begun_run, found_run
from learner.control.training import Training
from learner.control.update_metrics import update_metrics
from learner.finetuning.data import Demonstrations, load_demonstrations
from learner.finetuning.rank import SftGroup, UpdateBatch
from learner.finetuning.settings import SftConfig, check_resources
from learner.ranks.group import GroupState, group_state
from learner.ranks.rank import UpdateReport, lora_spec
from learner.reporting.reporter import best_words
from learner.runs import checkpoint as checkpoints
from learner.runs import identity
from learner.runs.atomic import atomic_write_text
from learner.runs.directory import RunDirectory
from learner.runs.session import check_cluster, check_local_gpus, joined_ray
from learner.runs.start import check_quantization, finished, require_adapter_fits, starting_adapter
from learner.runs.stopping import StopFlag
from rewards.errors import CheckpointError, ConfigError
from rollout.adapters import AdapterState
from rollout.code import code_identity
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.seeds import numpy_generator

COMMIT_SHARE = 0.05
"""Of a fine-tuning run's time, for keeping what a group of ranks needs to go on: an update may be short."""


def run(config: SftConfig, argv: Sequence[str] = ()) -> int:
    """Fine-tune as the settings say and return the process's exit status: 0, or 128 + signal when asked to stop.

    Args:
        argv: the command's arguments, to be recorded.

    Raises:
        UnmaskError: whatever ends the run; once it was begun, the run directory then says ``failed``.
    """
    check_local_gpus(config.resources.ray_address, config.learner.ranks * config.resources.gpus_per_rank)
    check_quantization(config.model, config.learner, config.resources)
    code_identity()
    check_cluster(config.resources.ray_address, insecure=config.resources.ray_insecure)
    assert config.model.path is not None
    data = _data(config, config.model.path)
    about = About(
        config=config,
        run=config.run,
        store=config.store,
        trackers=config.trackers,
        kind="sft",
        task="sft",
        objective="sft",
        iterations=total_updates(config, data),
        argv=argv,
        default_recipe=None,
    )
    with found_run(about) as found:
        if finished(found.run_dir, found.resumed, about.iterations):
            print(f"to go on, give more of them: sft.epochs={2 * config.sft.epochs}, for example")
            return 0
        return _train(config, about, found, data)


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


@dataclass(frozen=True)
class Grounds:
    """What a run starts from."""

    adapter: AdapterState | None
    identity: dict[str, Any]


class Finetuning(Training):
    """A fine-tuning run; it has no rollout actors."""

    config: SftConfig
    learner: SftGroup

    def __init__(
        self,
        config: SftConfig,
        begun: BegunRun,
        grounds: Grounds,
        data: Demonstrations,
        stop: StopFlag,
        commands: Commands,
        closing: contextlib.ExitStack,
    ) -> None:
        assert config.model.path is not None
        super().__init__(
            config,
            begun,
            stop,
            commands,
            identity=grounds.identity,
            iterations=total_updates(config, data),
            evaluate_every=config.sft.evaluate_every,
        )
        self.data = data
        self._first_adapter = grounds.adapter
        self.learner = self._start_ranks(group_state(begun.resumed) if begun.resumed is not None else None)
        closing.callback(lambda: self.learner.close())
        self.workers.learner = self.learner
        self._committed_at, self._commit_s = time.monotonic(), 0.0
        self._take_state()
        self._held_out = [ray.put(data.held_out)] if data.held_out else []

    def finish(self) -> dict[str, Any]:
        """Leave adapter, summary and plots behind; returns the summary."""
        state, peft_config = self.adapter.state, self.adapter.peft_config
        iteration = self.saved.iteration if self.saved is not None else 0
        best = self.progress.best.get("iteration")
        if self.config.sft.adapter == "best" and best:
            found = checkpoints.load(checkpoints.place(self.run_dir.checkpoints_dir, best))
            state, peft_config, iteration = dict(found.adapter), found.peft_config, best
        figures = {
            **{name: {"held_out": found} for name, found in self.progress.evaluations.items()},
            "adapter_of_iteration": iteration,
            "task": "sft",
            "demonstrations": len(self.data.train),
            "held_out_demonstrations": len(self.data.held_out),
        }
        return self._leave(state, peft_config, figures)

    def _start_ranks(self, state: GroupState | None) -> SftGroup:
        assert self.config.model.path is not None
        adapter, shards = (self._first_adapter, None) if state is None else (state.adapter.state, state.shards)
        return SftGroup(self.config, self.config.model.path, adapter=adapter, shards=shards, on_tick=self._tick)

    def _evaluate_base(self) -> None:
        """Held-out loss of what the run starts from, once per run."""
        if "base" not in self.progress.evaluations:
            self._evaluate("base", iteration=0)

    def _iterate(self, iteration: int) -> None:
        """Learn and report."""
        begin = time.monotonic()
        report = self._update(iteration)
        total = time.monotonic() - begin
        self._advance([report], total, self._committed())
        metrics = {
            **update_metrics([report]),
            **self.workers.gpu_peaks(),
            "epoch": (iteration + 1) * self.config.sft.batch / len(self.data.train),
            "time/iteration_s": total,
            "machine/tokens_per_s": report.plan_statistics["tokens"] / total,
            "forward_equivalents": 3.0 * report.plan_statistics["examples"],
        }
        self.reporter.iteration(iteration + 1, metrics)
        self.workers.tell(iteration + 1)
        self._check_finite([report])

    def _committed(self) -> GroupState | None:
        """What the ranks hold, unless asking for it would be more than a small share of the work."""
        begin = time.monotonic()
        if begin - self._committed_at < self._commit_s / COMMIT_SHARE:
            return None
        state = self.learner.commit()
        self._committed_at = time.monotonic()
        self._commit_s = self._committed_at - begin
        return state

    def _update(self, number: int) -> UpdateReport:
        batch = update_batch(self.data, seed=self.config.run.seed, batch=self.config.sft.batch, number=number)
        return self.learner.update([ray.put(batch)], number, self._learning_rate(number, self._iterations))

    def _evaluate_trained(self, iteration: int) -> None:
        self._evaluate("trained", iteration=iteration)

    def _evaluate(self, name: str, *, iteration: int) -> None:
        if not self._held_out:
            return
        figures = self.learner.held_out(self._held_out)
        loss = figures["held_out/loss"]
        better = iteration > 0 and loss < self.progress.best.get("loss", float("inf"))
        self._evaluated(name, iteration, figures, metrics=figures, best={"loss": loss} if better else None)


def _grounds(config: SftConfig, found: FoundRun, data: Demonstrations) -> Grounds:
    """Raises ConfigError or CheckpointError where a run that goes on would be another one."""
    assert config.model.path is not None
    resumed = found.resumed
    if resumed is not None:
        identity.require_fixed_settings(found.run_dir.path, resumed.progress, config)
        checkpoints.require_layout(resumed.progress, checkpoints.layout_of(config.learner))
    is_now = {
        **identity.fixed_settings(config),
        "base": identity.base_digest(config.model.path),
        "data": data.fingerprint,
    }
    if resumed is not None:
        _same_data(data, found.run_dir)
        identity.require_same(resumed.progress, is_now)
        return Grounds(resumed.adapter, is_now)
    adapter = starting_adapter(config.lora, config.learner.dtype)
    if adapter is not None:
        require_adapter_fits(config.lora, adapter, config.model.path, lora_spec(config))
    return Grounds(adapter, is_now)


def _train(config: SftConfig, about: About, found: FoundRun, data: Demonstrations) -> int:
    with contextlib.ExitStack() as stack:
        grounds = _grounds(config, found, data)
        begun = stack.enter_context(begun_run(about, found)) if found.run_dir.is_new else None
        cpus = config.learner.ranks * config.resources.cpus_per_rank
        wanted, check = config.resources.ray_address, partial(check_resources, config)
        told = stack.enter_context(joined_ray(wanted, cpus, check, insecure=config.resources.ray_insecure))
        stop = stack.enter_context(StopFlag())
        if begun is None:
            begun = stack.enter_context(begun_run(about, found))
        if found.resumed is None:
            _note_data(data, begun.run_dir)
        reporter = begun.reporter
        commands = stack.enter_context(Commands(begun.run_dir, reporter, stop, since=begun.since))
        closing = stack.enter_context(contextlib.ExitStack())
        reporter.event("info", "start", f"run {begun.run_dir.id}: {told}; model {config.model.path}")
        for sentence in data.told:
            reporter.event("warning", "data", sentence)
        counted = f"{len(data.train)} demonstrations to learn, {len(data.held_out)} held out"
        reporter.event("info", "data", f"{counted}; {about.iterations} updates of {config.sft.batch}")
        start = partial(Finetuning, config, begun, grounds, data, stop, commands, closing)
        summary = see_through(start, reporter, stop, commands)
        if summary is None:
            return stop.exit_status
        reporter.event("info", "end", _closing_words(summary, begun.run_dir))
        return 0


def _closing_words(summary: dict[str, Any], run_dir: RunDirectory) -> str:
    where = f"the adapter after {summary['adapter_of_iteration']} updates is in {run_dir.adapter_dir}"
    where = f"{where}; {best_words(summary)}"
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


def _note_data(data: Demonstrations, run_dir: RunDirectory) -> None:
    about = {"demonstrations": len(data.train), "held_out": len(data.held_out), "sha256": data.fingerprint}
    atomic_write_text(run_dir.path / "data.json", json.dumps(about, indent=2) + "\n")


def _same_data(data: Demonstrations, run_dir: RunDirectory) -> None:
    path = run_dir.path / "data.json"
    try:
        before = json.loads(path.read_text())["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}, which names the run's demonstrations, can't be read: {error}") from error
    if before != data.fingerprint:
        raise CheckpointError(
            f"the demonstrations are not those that {run_dir.path} was started with (or they are encoded or split "
            "otherwise); restore them, or start a new run with lora.adapter=<checkpoint>/adapter"
        )
