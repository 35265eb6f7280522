"""Evaluate: ``python -m learner.evaluate [--run RUN | recipe=NAME] [key.sub=value ...]``.

Only parses: what is defined here would be called ``__main__.X`` on Ray's workers, so the work is in
``learner.evaluation``.
"""

import sys
from collections.abc import Sequence
from functools import partial

from learner.evaluation.settings import help_text, load_evaluation
from learner.runs.stopping import exit_status, interrupting
from rewards.errors import ConfigError

USAGE = """usage: python -m learner.evaluate [--run RUN | recipe=NAME] [key.sub=value ...]

Solve rates of a base and an adapter, side by side, over a grid of step counts, position orders, thresholds and samples.
The same command goes on where it was stopped. Writes results.json, results.png and results.jsonl (every completion).

  --run RUN        run directory whose settings, base model, adapter and held-out problems are taken
  recipe=NAME      settings of a recipe instead (default: sudoku), with model.path=... and adapter=...
  --help           this text
"""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, 1 when the evaluation failed, 2 for wrong settings, 128 + signal when asked to stop."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str]) -> int:
    if set(argv) & {"--help", "-h"}:
        print(f"{USAGE}\n{help_text()}", end="")
        return 0
    run, settings = _run_option(argv)
    config, run_dir = load_evaluation(settings, run)
    with interrupting():
        from learner.evaluation.drive import evaluate  # torch and Ray take seconds to import

        return evaluate(config, run_dir)


def _run_option(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of ``--run RUN`` or ``--run=RUN``, and the other arguments."""
    runs, rest, arguments = [], [], list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--run":
            if not arguments:
                raise ConfigError("--run needs the folder of a run")
            runs.append(arguments.pop(0))
        elif argument.startswith("--run="):
            runs.append(argument.removeprefix("--run="))
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument}; see --help")
        else:
            rest.append(argument)
    if len(runs) > 1:
        raise ConfigError(f"--run is given {len(runs)} times; give one")
    return (runs[0] if runs else None), rest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
