"""Evaluate from start to end: what is there already, what is missing on Ray's actors, table, JSON and plot."""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from learner.evaluation.cells import Cell, grid
from learner.evaluation.naturalness import Naturalness
from learner.evaluation.plot import plot_report
from learner.evaluation.report import cell_reports, machine_reports
from learner.evaluation.results import POLICIES, Chunk, ChunkId, ResultsFile, settings_key
from learner.evaluation.settings import EvaluateConfig, check_paths
from learner.evaluation.subject import (
    Adapter,
    base_model,
    evaluated_problems,
    fingerprint_model,
    fingerprint_problems,
    lora_spec,
    problems_that_fit,
    read_adapter,
    trained_on,
)
from learner.evaluation.table import print_table
from learner.runs.atomic import atomic_write_text
from learner.runs.session import check_local_gpus, ray_session
from learner.runs.start import check_engine
from learner.runs.stopping import StopFlag, StopRequested
from learner.settings.run import in_ray_job, required_resources
from learner.supply.actors import start_actors
from learner.supply.judging import tried_judge
from rewards.task import Problem
from rollout.code import code_identity
from rollout.events import ActorLost
from rollout.messages import BASE_WEIGHTS, EvalReport, Weights
from rollout.pool import RolloutPool

_TELL_EVERY_S = 10.0

RESULTS, REPORT, PLOT = "results.jsonl", "results.json", "results.png"


def evaluate(config: EvaluateConfig, run_dir: Path | None) -> int:
    """Evaluate as the settings say and return the process's exit status: 0, or 128 + signal when asked to stop.

    Raises:
        UnmaskError: whatever ends the evaluation; the chunks that are done are kept.
    """
    check_paths(config, run_dir, in_ray_job())
    code = code_identity().digest
    adapter = read_adapter(config, run_dir)
    problems = evaluated_problems(config, on_event=_say)
    model_path = base_model(config, run_dir, adapter)
    lora = None if adapter is None else lora_spec(adapter, model_path)
    check_engine(
        config.rollout,
        config.model,
        config.resources,
        model_path=model_path,
        r=None if lora is None else lora.r,
        adapts_head=lora is not None and lora.include_head,
    )
    problems = problems_that_fit(config, problems, model_path, on_event=_say)
    settings = result_settings(config, model_path, adapter, problems)
    out = _out_folder(config, run_dir, settings)
    overlap = trained_on(config, problems, on_event=_say)
    _tell_subject(config, run_dir, model_path, adapter, problems, overlap)
    with ResultsFile(out / RESULTS, settings, code=code, shared=config.run.shared) as results:
        work = _Work(config, model_path, problems, grid(config), _policies(config, adapter), results)
        work.tell_start()
        status = 0
        if work.missing:
            # Ranks are no part of an evaluation; what a run gives them is not asked of Ray here.
            without_ranks = {"cpus_per_rank": 0.0, "gpus_per_rank": 0.0, "one_process": False}
            resources = config.resources.model_copy(update=without_ranks)
            config = config.model_copy(update={"resources": resources})
            if (judge := tried_judge(config.task.judge, problems)) is not None:
                _say("info", "judge", judge)
            check_local_gpus(resources.ray_address, required_resources(config)[1])
            with ray_session(config) as told, StopFlag() as stop, contextlib.ExitStack() as closing:
                print(f"{told}; {config.rollout.wanted_actors} actors", flush=True)
                pool = start_actors(config, model_path, lora, seed=config.noise_seed)
                closing.callback(pool.close)
                pool.wait_ready()
                weights = {"base": BASE_WEIGHTS}
                if adapter is not None:
                    weights["adapter"] = Weights(0, adapter.digest, [ray.put(adapter.state)])
                try:
                    work.run(pool, weights, stop)
                except StopRequested:
                    status = stop.exit_status
        subject = {
            "run": str(run_dir) if run_dir is not None else None,
            "model": model_path,
            "adapter": str(adapter.source) if adapter is not None else None,
            "data": config.data.model_dump(),
            "problems_trained_on": overlap,
        }
        report = {"subject": subject, "settings": settings, **work.report()}
        _write(out, report)
    if report["cells"]:
        print_table(report, Console(highlight=False))
    if status:
        print(f"stopped with {len(work.missing)} of {work.total} chunks to do; the same command goes on", flush=True)
    print(f"everything is in {out}", flush=True)
    return status


def result_settings(
    config: EvaluateConfig, model_path: str, adapter: Adapter | None, problems: list[Problem]
) -> dict[str, Any]:
    """All that the completions depend on besides the cell. What only decides how fast they come is not here."""
    return {
        "model": fingerprint_model(model_path),
        "adapter": adapter.digest if adapter is not None else None,
        "task": config.task.name,
        "data": {"split": config.data.split, "problems": len(problems), "sha256": fingerprint_problems(problems)},
        "noise_seed": config.noise_seed,
        "rows": config.rollout.max_rows,
        "dtype": config.learner.dtype,
        "quantization": config.model.quantization,
        "device": "cuda" if config.resources.gpus_per_actor > 0 else "cpu",
        "grade_timeout_s": config.rollout.grade_timeout_s,
        **({"engine": config.rollout.engine} if config.rollout.engine != "torch" else {}),
        **({"judge": config.task.judge.meaning} if config.task.judge.meaning else {}),
        **({"verdicts": decided} if (decided := config.task.load().verdicts_by()) else {}),
    }


class _Work:
    """The chunks of the grid, which of them are missing, and the way to them."""

    def __init__(
        self,
        config: EvaluateConfig,
        model_path: str,
        problems: Sequence[Problem],
        cells: Sequence[Cell],
        policies: Sequence[str],
        results: ResultsFile,
    ) -> None:
        self.config, self.model_path, self.problems = config, model_path, problems
        self.cells, self.policies, self.results = cells, policies, results
        self.ids = {(cell, policy): self._chunk_ids(cell, policy) for policy in policies for cell in cells}
        self.total = sum(len(ids) for ids in self.ids.values())

    @property
    def missing(self) -> list[ChunkId]:
        return [at for ids in self.ids.values() for at in ids if at not in self.results.chunks]

    def tell_start(self) -> None:
        done = self.total - len(self.missing)
        print(
            f"{len(self.problems)} problems, {len(self.cells)} ways to decode, {' and '.join(self.policies)}: "
            f"{self.total} chunks, {done} of them done",
            flush=True,
        )
        if self.results.dropped_lines:
            _say("warning", "results", f"{self.results.dropped_lines} torn or damaged lines of {RESULTS} don't count")
        if self.results.other_code:
            _say("warning", "results", f"some chunks of {RESULTS} were drawn by other code than this")

    def run(self, pool: RolloutPool, weights: dict[str, Weights], stop: StopFlag) -> None:
        """Evaluate what is missing, a policy after the other. Raises StopRequested when asked to stop."""
        progress = _Progress(self)
        for (cell, policy), ids in self.ids.items():
            todo = [at for at in ids if at not in self.results.chunks]
            if not todo:
                continue
            size = self._chunk_size(cell)
            # All chunks but the last of the problems are full, so the pool cuts the same ones out of these again.
            wanted = [problem for at in todo for problem in self.problems[at.chunk * size : (at.chunk + 1) * size]]

            def keep(index: int, report: EvalReport, todo: Sequence[ChunkId] = todo) -> None:
                self.results.append(todo[index], Chunk.of(report))

            def tick(cell: Cell = cell, policy: str = policy) -> Sequence[int]:
                progress.tell(cell, policy)
                _tell_losses(pool)
                stop.enforce(0.0)
                return ()

            pool.evaluate(
                wanted,
                cell.sampler,
                weights[policy],
                chunk_size=size,
                timeout_s=self.config.timeouts.evaluate,
                expire=tick,
                samples=cell.samples,
                on_chunk=keep,
            )
            progress.tell(cell, policy, always=True)

    def report(self) -> dict[str, Any]:
        """The findings for results.json; only ``machine`` may differ between two equal evaluations."""
        done = self.results.chunks
        evaluated = {pair: [done[at] for at in ids] for pair, ids in self.ids.items() if all(at in done for at in ids)}
        config, statistics = self.config, self.config.statistics
        base = Naturalness(config, self.model_path, self.problems) if statistics.naturalness and evaluated else None
        cells = cell_reports(
            evaluated,
            pass_at=config.pass_at,
            confidence=statistics.confidence,
            resamples=statistics.resamples,
            seed=config.noise_seed,
            naturalness=None if base is None else base.of_completions(evaluated),
        )
        unfinished = [f"{policy}: {cell.label}" for cell, policy in self.ids if (cell, policy) not in evaluated]
        return {
            "statistics": statistics.model_dump(),
            "problems": len(self.problems),
            "complete": not unfinished,
            "unfinished": unfinished,
            "cells": cells,
            **({} if base is None else {"naturalness_of_originals": base.of_originals()}),
            "machine": {"cells": machine_reports(evaluated), "dropped_lines": self.results.dropped_lines},
        }

    def _chunk_size(self, cell: Cell) -> int:
        """Problems of a chunk: as many as fill the actor's rows, whatever the number of actors."""
        return max(1, self.config.rollout.max_rows // cell.samples)

    def _chunk_ids(self, cell: Cell, policy: str) -> list[ChunkId]:
        count = math.ceil(len(self.problems) / self._chunk_size(cell))
        return [ChunkId(cell.key, policy, chunk) for chunk in range(count)]


class _Progress:
    """A line every few seconds, and one when a cell is finished."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._begin = self._told = time.monotonic()
        self._before = self._cost_done()
        self._all = sum(self._cost(cell) * len(ids) for (cell, _), ids in work.ids.items())

    def tell(self, cell: Cell, policy: str, *, always: bool = False) -> None:
        now = time.monotonic()
        if not always and now - self._told < _TELL_EVERY_S:
            return
        self._told, done = now, self._cost_done()
        took, fresh = now - self._begin, done - self._before
        left = f", about {took * (self._all - done) / fresh:.0f} s left" if fresh and done < self._all else ""
        ids = self._work.ids[cell, policy]
        have = [self._work.results.chunks[at] for at in ids if at in self._work.results.chunks]
        verdicts = [right for chunk in have for problem in chunk.problems for right in problem["correct"]]
        rate = f"{sum(verdicts) / len(verdicts):.3f}" if verdicts else "-"
        print(
            f"{policy}, {cell.label}: {len(have)}/{len(ids)} chunks, solved {rate}; "
            f"{100 * done / self._all:.0f} % of all after {took:.0f} s{left}",
            flush=True,
        )

    def _cost(self, cell: Cell) -> int:
        """Of a chunk, in forward passes of one row."""
        return self._work._chunk_size(cell) * cell.samples * cell.sampler.steps

    def _cost_done(self) -> int:
        done = self._work.results.chunks
        return sum(self._cost(cell) for (cell, _), ids in self._work.ids.items() for at in ids if at in done)


def _policies(config: EvaluateConfig, adapter: Adapter | None) -> list[str]:
    wanted = {"base": config.base, "adapter": adapter is not None}
    return [policy for policy in POLICIES if wanted[policy]]


def _out_folder(config: EvaluateConfig, run_dir: Path | None, settings: dict[str, Any]) -> Path:
    if config.out is not None:
        return Path(config.out).expanduser().absolute()
    home = run_dir if run_dir is not None else Path.cwd()
    return home / "evaluations" / f"{config.data.split}-{settings_key(settings)[:8]}"


def _tell_subject(
    config: EvaluateConfig,
    run_dir: Path | None,
    model_path: str,
    adapter: Adapter | None,
    problems: Sequence[Problem],
    overlap: int | None,
) -> None:
    print(f"settings of {f'run {run_dir}' if run_dir is not None else 'a recipe'}; base model {model_path}")
    if adapter is not None:
        print(f"adapter {adapter.source} ({adapter.digest[:12]})")
    if overlap and config.data.split == "test":
        _say("warning", "leaks", f"{overlap} of {len(problems)} problems share their solution with a training problem")


def _tell_losses(pool: RolloutPool) -> None:
    for event in pool.poll(0.0):
        if isinstance(event, ActorLost):
            _say("warning", "actor", event.error)


def _write(out: Path, report: dict[str, Any]) -> None:
    atomic_write_text(out / REPORT, json.dumps(report, indent=2, allow_nan=False) + "\n")
    plot_report(report, out / PLOT)


def _say(level: str, kind: str, text: str) -> None:
    print(f"{level}: {text}", flush=True)
