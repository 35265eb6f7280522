"""Evaluate: ``python -m learner.evaluate [--run RUN | recipe=NAME] [key.sub=value ...]``.

Only parses: what is defined here would be called ``__main__.X`` on Ray's workers, so the work is in
``learner.evaluation``.
"""

import sys
from collections.abc import Sequence
from functools import partial

from learner.evaluation.settings import help_text, load_evaluation
from learner.runs.stopping import exit_status, interrupting
from learner.settings.command import SettingsParser
from rollout.process import prepare_process

DESCRIPTION = """Solve rates of a base and an adapter, side by side, over a grid of step counts, position orders,
thresholds and samples. The same command goes on where it was stopped. Writes results.json, results.png and
results.jsonl (every completion).

recipe=NAME takes the settings of a recipe (default: sudoku), with model.path=... and adapter=..."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when the evaluation failed, 2 for wrong settings, 128 + signal when asked to stop."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    usage = "%(prog)s [--run RUN | recipe=NAME] [key.sub=value ...]"
    parser = SettingsParser("python -m learner.evaluate", DESCRIPTION, help_text, usage=usage)
    parser.add_argument(
        "--run", help="run directory whose settings, base model, adapter and held-out problems are taken"
    )
    options = parser.read(argv)
    config, run_dir = load_evaluation(options.settings, options.run)
    with interrupting():
        from learner.evaluation.drive import evaluate  # torch and Ray take seconds to import

        return evaluate(config, run_dir)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
