"""Faults at random, for a while: ``make chaos SEED=1 MINUTES=10`` (``python -m tests.chaos.soak --help``).
With ``--each``, every fault once, one at a time, in one run.

Rounds of whole runs, of a method each, under ``run.restarts``. In each round faults are drawn from the seed and done
one after the other; then the run must have ended well, with the same rows and the same adapter, bit for bit, as a run
of the same settings that nothing happened to, and each group must have been learned from once. Ends with a line that
says faults, recoveries, losses and the verdict, and with status 1 unless the verdict is "sound".
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from learner.runs.directory import RunDirectory
from learner.settings.saved import starts
from tests.chaos.injections import HOW, LIMIT_S, TARGETS, Injected, inject
from tests.support.real_runs import LEDGER_STATES, Runs, adapter_digest, rows, training_rows

FAULTS_A_ROUND = 8
ROUND_S = 900.0
"""For a run to end after its last fault."""
SETTINGS = ("recipe=smoke", "rollout.actors={min: 1, max: 2}", "checkpoint.every=20")
SETTINGS += ("evaluation.every=0",)
SETTINGS += ("evaluation.step_divisors=[1]", "evaluation.problems=8", "samples_per_iteration=0")
SETTINGS += ("timeouts.heartbeat=5", "rollout.grade_timeout_s=3", "timeouts.lease=60")
METHODS: dict[str, tuple[str, ...]] = {
    "agrpo": (),
    "dtm": ("objective.type=dtm", "objective.phase_iterations=4", "objective.buffer_prompts=8", "objective.ema=0.5"),
    "two-ranks": ("learner.ranks=2", "learner.zero_stage=2", "objective.type=espo", "learner.updates_per_batch=2"),
    "values": ("objective.type=trace_rl", "objective.value_lr=1e-3"),
}
"""What a fault could cost: adapter and moments, a teacher with a buffer, shards and old scores, a head."""
ALL = [(part, how) for part in TARGETS for how in HOW]
ALL.remove(("controller", "exits"))  # a SIGTERM asks it to stop, which it does
RARE = ("controller", "gcs", "raylet")
"""Those that end the run's process, which is then started again."""


def draws(draw: random.Random) -> Iterator[tuple[str, str]]:
    """Faults without end. Those that cost a start of the whole run come more seldom."""
    while True:
        part, how = draw.choice(ALL)
        if part not in RARE or draw.random() < 0.4:
            yield part, how


def disturbed(
    runs: Runs, name: str, settings: Sequence[str], faults: Iterator[tuple[str, str]], draw: random.Random, count: int
) -> tuple[list[Injected], list[str]]:
    """A run to which so many faults are done, if it lasts; and how it failed to go on, or to end well."""
    found: list[Injected] = []
    with runs.started(name, *settings, "run.restarts=99") as run:
        run.wait_for_row(2)
        for part, how in faults:
            time.sleep(draw.uniform(0.0, 1.5))
            done = inject(run, part, how, draw)
            if done is not None:
                print(f"  {told(done)}", flush=True)
                found.append(done)
                if done.went_on_s is None and run.popen.poll() is None:
                    return found, [f"{name}: no work within {LIMIT_S:g} s after {part} {how}"]
            if len(found) == count or run.popen.poll() is not None:
                break
        try:
            status = run.wait(ROUND_S)
        except AssertionError as error:
            return found, [f"{name}: {error}"]
    return found, [f"{name}: ended with status {status}: {run.output()[-4000:]}"] if status else []


def told(done: Injected) -> str:
    """A fault in a line."""
    noticed = "without an event" if done.noticed_s is None else f"noticed after {done.noticed_s:.1f} s"
    went_on = "work did NOT go on" if done.went_on_s is None else f"work went on after {done.went_on_s:.1f} s"
    fault = f"iteration {done.iteration}: {done.part} {done.how}"
    return f"{fault}, {noticed}, {went_on}, {done.repeated} iterations done again"


def losses(run_dir: RunDirectory, whole: RunDirectory, faults: Sequence[Injected] = ()) -> list[str]:
    """What isn't as in the run that nothing happened to, or was started again for a fault that must not end it."""
    found = []
    again, ending = len(starts(run_dir.path)) - 1, sum(each.part in RARE for each in faults)
    if again > ending:
        found.append(f"the run was started again {again} times, for {ending} faults that end its process")
    if rows(run_dir) != rows(whole):
        found.append("rows of metrics.jsonl differ")
    if adapter_digest(run_dir) != adapter_digest(whole):
        found.append("the adapter differs")
    for row in training_rows(run_dir):
        if row["ledger/issued"] != sum(row[f"ledger/{state}"] for state in LEDGER_STATES):
            found.append(f"the ledger of iteration {row['iteration']} doesn't add up")
    if training_rows(run_dir)[-1]["ledger/consumed"] != training_rows(whole)[-1]["ledger/consumed"]:
        found.append("groups were learned from twice, or not at all")
    return found


def soak(
    folder: Path,
    *,
    seed: int,
    minutes: float,
    methods: Sequence[str] = tuple(METHODS),
    count: int = FAULTS_A_ROUND,
    iterations: int = 240,
    cache: Path | None = None,
    each: bool = False,
) -> tuple[list[Injected], list[str]]:
    """The faults that were done, and what was lost."""
    settings = (*SETTINGS, f"run.iterations={iterations}")
    runs = Runs(folder, cache or Path("~/.cache/unmask").expanduser(), settings=settings)
    draw, begin = random.Random(seed), time.monotonic()
    faults: Iterator[tuple[str, str]] = iter(ALL) if each else draws(draw)
    number, count = 0, len(ALL) if each else count
    done: list[Injected] = []
    lost: list[str] = []
    while not number or (not each and time.monotonic() - begin < 60 * minutes):
        method = methods[number % len(methods)]
        if not runs[f"whole-{method}"].summary_path.exists():
            runs.train(f"whole-{method}", *METHODS[method], limit_s=ROUND_S)
        print(f"round {number + 1}: {method}", flush=True)
        name = f"chaos-{number}-{method}"
        faced, failed = disturbed(runs, name, METHODS[method], faults, draw, count)
        done += faced
        lost += failed or [f"{name}: {what}" for what in losses(runs[name], runs[f"whole-{method}"], faced)]
        number += 1
    return done, lost


def verdict(seed: int, done: Sequence[Injected], lost: Sequence[str]) -> str:
    """The last line."""
    kinds = Counter(each.part for each in done)
    shown = ", ".join(f"{count} {part}" for part, count in sorted(kinds.items()))
    recoveries = sum(each.went_on_s is not None for each in done)
    sound = "sound" if done and recoveries == len(done) and not lost else "NOT SOUND"
    return f"seed {seed}: {len(done)} faults ({shown}), {recoveries} recoveries, {len(lost)} losses: {sound}"


def main() -> int:
    """Status 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="no new round begins later")
    parser.add_argument("--each", action="store_true", help="every fault once, in one round")
    parser.add_argument("--json", type=Path, help="file for all faults and what came of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="unmask-chaos-") as folder:
        done, lost = soak(Path(folder), seed=options.seed, minutes=options.minutes, each=options.each)
    for what in lost:
        print(what)
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in done], indent=2) + "\n")
    line = verdict(options.seed, done, lost)
    print(line)
    return 0 if line.endswith(": sound") else 1


if __name__ == "__main__":
    sys.exit(main())
