"""A comparison from start to end: what is done already, what is missing, several runs side by side, the report."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from learner.comparison.cells import Cell, Findings, findings_path, found_cells, ready_cells
from learner.comparison.findings import outcomes, results_of
from learner.comparison.noise import found_noise, measure_noise
from learner.comparison.outline import outline_text
from learner.comparison.plot import plot_comparison
from learner.comparison.processes import RunFailed, Stopped, lock_of_runs, run_module
from learner.comparison.report import comparison_report
from learner.comparison.settings import ComparisonConfig
from learner.comparison.table import report_text
from learner.runs.atomic import atomic_write_text, disk_errors
from learner.runs.directory import RunDirectory, make_folder
from learner.runs.lock import FileLock, Held
from learner.runs.stopping import StopFlag, lasting_output
from rewards.errors import ConfigError, DataError
from rollout.code import code_identity

RESULTS, TABLE = "results.json", "results.md"
EVALUATION = "evaluations/comparison"


def compare(config: ComparisonConfig, *, parallel: int) -> int:
    """Run what is missing, ``parallel`` runs at a time, and write the report; the process's exit status: 0, 1 when a
    cell failed, or 128 + signal when asked to stop.

    Raises:
        ConfigError: another comparison works in the folder, or it holds runs of other settings.
    """
    out = Path(config.out).expanduser().absolute()
    for folder in (out, out / "cells", out / "logs"):
        with disk_errors(folder):
            make_folder(folder, shared=False)
    try:
        own = FileLock(out / "comparison.lock")
    except Held as holder:
        raise ConfigError(f"another comparison works in {out} ({holder}); wait for it, or give out=") from None
    with own, StopFlag() as stop, lasting_output(lambda error: None):  # nobody has to read what it prints
        found = found_cells(config, out)
        for name in [name for name, findings in found.items() if findings.failed]:
            print(f"{name} failed before and is tried again", flush=True)
            del found[name]
        print(outline_text(config, found, parallel=parallel), flush=True)
        try:
            with lock_of_runs(out / "runs.lock", wait_s=config.run_limit_s, stop=stop.is_set) as lock:
                _run_all(config, out, found, parallel, stop.is_set, lock)
                measure_noise(config, out, found, stop.is_set, lock)
        except Stopped:
            pass
        _write(config, out, found)
        if stop.is_set():
            print("stopped; the same command goes on", flush=True)
            return stop.exit_status
    return 1 if any(findings.failed for findings in found.values()) else 0


def _run_all(
    config: ComparisonConfig, out: Path, found: dict[str, Findings], parallel: int, stop: Callable[[], bool], lock: int
) -> None:
    """Raises Stopped when asked to stop, once the runs under way have ended."""
    running: dict[Future[Findings], Cell] = {}
    with ThreadPoolExecutor(max_workers=parallel) as threads:
        while True:
            if len(running) < parallel and not stop():  # to look for cells takes a fifth of a second
                busy = {cell.name for cell in running.values()}
                waiting = [cell for cell in ready_cells(config, found) if cell.name not in busy]
                for cell in waiting[: parallel - len(running)]:
                    print(f"{cell.name}: {cell.iterations} iterations", flush=True)
                    running[threads.submit(run_cell, cell, out, config.run_limit_s, stop, lock)] = cell
            if not running:
                break
            for future in wait(running, timeout=1.0, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                with contextlib.suppress(Stopped):
                    found[cell.name] = findings = future.result(timeout=0)
                    print(f"{cell.name}: {_outcome(findings)}", flush=True)
                    _write(config, out, found)
    if stop():
        raise Stopped


def run_cell(cell: Cell, out: Path, limit_s: float, stop: Callable[[], bool], lock: int) -> Findings:
    """Train and evaluate, or go on where an earlier start was cut off, and keep what was found beside the run.

    Raises:
        Stopped: asked to stop; what is done is kept.
    """
    folder, log, begun = out / cell.name, out / "logs" / f"{cell.name}.log", time.monotonic()
    place = [f"run.dir={out}", f"run.name={cell.name}", "run.resume=auto"]
    try:
        peak = run_module("learner.main", [*cell.arguments, *place], log=log, lock=lock, limit_s=limit_s, stop=stop)
        grid = [
            f"decode.position_rules=[{cell.run.evaluation.position_rule}]",
            f"decode.steps={list(cell.step_counts)}",
            "decode.thresholds=[]",
            f"data.size={cell.problems}",
            f"out={folder / EVALUATION}",
        ]
        run_module("learner.evaluate", ["--run", str(folder), *grid], log=log, lock=lock, limit_s=limit_s, stop=stop)
        results = results_of(cell, RunDirectory(folder), folder / EVALUATION)
        results["machine"] |= {
            "peak_rank_bytes": peak or None,
            "wall_s": time.monotonic() - begun,
            "code": code_identity().digest[:16],
            "cores": os.cpu_count(),
        }
        findings = Findings(cell.key, None, results)
    except (RunFailed, DataError) as error:
        findings = Findings(cell.key, str(error), {})
    atomic_write_text(findings_path(out, cell), json.dumps(dataclasses.asdict(findings), indent=1) + "\n")
    return findings


def _write(config: ComparisonConfig, out: Path, found: dict[str, Findings]) -> None:
    report = comparison_report(config, found, found_noise(config, out, found))
    atomic_write_text(out / RESULTS, json.dumps(report, indent=1, allow_nan=False) + "\n")
    atomic_write_text(out / TABLE, report_text(report))
    plot_comparison(report, out)


def _outcome(findings: Findings) -> str:
    if findings.failed:
        return f"failed: {findings.failed}"
    spent = findings.results["spent"]["total"]
    solved = findings.results["solved"]
    told = ", ".join(f"{outcomes(both['trained']).mean():.3f} in {steps} steps" for steps, both in solved.items())
    return f"{spent:,.0f} forward-equivalents in {findings.results['machine']['train_s']:.0f} s; solved {told}"
