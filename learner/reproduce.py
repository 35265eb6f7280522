"""Run the recipes that the README reports over several seeds, and write its tables.

    python -m learner.reproduce [recipes=sudoku,countdown] [seeds=0,1,2] [run.dir=runs] [key.sub=value ...]

Each run is ``python -m learner.main`` in a process of its own. A recipe's table goes into docs/results.md, between the
marks ``<!-- results:RECIPE -->`` and ``<!-- /results -->``, and its row into the table of README.md, both in the
current folder, and only where they are there already.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from learner.planning.hardware import processor_name
from learner.runs.atomic import atomic_write_text
from learner.runs.stopping import exit_status
from learner.settings.command import SettingsParser
from learner.settings.run import help_text, load_config
from rewards.errors import ConfigError
from rollout.process import prepare_process

RUN_LIMIT_S = 3600.0
USAGE = "%(prog)s [recipes=NAME,NAME] [seeds=N,N] [run.dir=FOLDER] [key.sub=value ...]"


DESCRIPTION = """Run recipes over several seeds, each run a learner.main of its own, and write their tables.

recipes=sudoku,countdown and seeds=0,1,2 are the defaults; all other settings are learner.main's. The exit status is
that of the first run that failed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the first run that failed, or 0; 2 for wrong settings."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = SettingsParser("python -m learner.reproduce", DESCRIPTION, help_text, usage=USAGE)
    options = {"recipes": "sudoku,countdown", "seeds": "0,1,2", "run.dir": "runs"}
    overrides = []
    for argument in parser.read(argv).settings:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        else:
            overrides.append(argument)
    if not re.fullmatch(r"\d+(,\d+)*", options["seeds"]):
        raise ConfigError(f"seeds={options['seeds']} is not a list of seeds; write seeds=0,1,2")
    seeds = [int(seed) for seed in options["seeds"].split(",")]
    for recipe in options["recipes"].split(","):
        steps = load_config([f"recipe={recipe}", *overrides]).rollout.sampler.steps  # refuses before anything runs
        summaries = {}
        for seed in seeds:
            name = f"reproduce-{recipe}-{seed}"
            arguments = [f"recipe={recipe}", f"run.dir={options['run.dir']}", f"run.name={name}", f"run.seed={seed}"]
            # A run that was cut off goes on; one that is complete only writes its summary again.
            command = [sys.executable, "-m", "learner.main", *arguments, "run.resume=auto", *overrides]
            print(f"\n== {' '.join(arguments)}", flush=True)
            status = subprocess.run(command, timeout=RUN_LIMIT_S).returncode
            if status:
                return status
            summaries[seed] = json.loads((Path(options["run.dir"]) / name / "summary.json").read_text())
        told = ["python -m learner.reproduce", f"recipes={recipe}", f"seeds={options['seeds']}", *overrides]
        table = results_table(summaries, steps=steps, command=" ".join(told))
        print(f"\n{table}")
        marks = rf"(?s)(?<=<!-- results:{re.escape(recipe)} -->\n).*?(?=<!-- /results -->)"
        _replace(Path("docs") / "results.md", marks, table)
        _replace(Path("README.md"), rf"(?m)^\| `{re.escape(recipe)}` \|.*\n", results_row(recipe, summaries))
    return 0


def results_table(summaries: Mapping[int, Mapping[str, Any]], *, steps: int, command: str) -> str:
    """Markdown: a row per seed and step count, the mean gain, the command and the machine."""
    lines = ["| seed | denoising steps | base | trained | gain | training |", "|---|---|---|---|---|---|"]
    gains = []
    for seed, summary in summaries.items():
        base, trained = summary["base"]["greedy"], summary["trained"]["greedy"]
        gains.append(trained["m"] - base["m"])
        for i, key in enumerate(base):
            count = steps // int(key.partition("/")[2] or 1)
            took = f"{summary['train_seconds']:.0f} s" if i == 0 else ""
            gain = trained[key] - base[key]
            lines.append(f"| {seed} | {key} = {count} | {base[key]:.3f} | {trained[key]:.3f} | {gain:+.3f} | {took} |")
    problems = next(iter(summaries.values()))["held_out_problems"]
    runs = f"{len(gains)} seed" + "s" * (len(gains) > 1)
    lines += [
        "",
        f"Greedy exact-solve rate on {problems} held-out problems; mean gain at m steps over {runs}: "
        f"**{mean(gains):+.3f}** (smallest {min(gains):+.3f}). `{command}` on {os.cpu_count()} cores of "
        f"{processor_name()}, no GPU.",
        "",
    ]
    return "\n".join(lines)


def results_row(recipe: str, summaries: Mapping[int, Mapping[str, Any]]) -> str:
    """The recipe's row in the README's table: rates averaged over the seeds, and the smallest gain beside the mean."""
    bases, trained = ([summary[which]["greedy"] for summary in summaries.values()] for which in ("base", "trained"))
    gains = [after["m"] - before["m"] for before, after in zip(bases, trained, strict=True)]
    rates = " / ".join(f"{mean(rate[key] for rate in trained):.3f}" for key in trained[0])
    base = mean(rate["m"] for rate in bases)
    return f"| `{recipe}` | {len(gains)} | {base:.3f} | {rates} | **{mean(gains):+.3f}** ({min(gains):+.3f}) |\n"


def _replace(page: Path, pattern: str, text: str) -> None:
    """Put ``text`` in place of what matches, if the page is there and anything does."""
    if page.exists() and re.search(pattern, old := page.read_text(encoding="utf-8")):
        atomic_write_text(page, re.sub(pattern, lambda _: text, old))


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
