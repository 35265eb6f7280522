"""How noisy is a method's gradient, for what it costs?

    python -m learner.bench.gradient_noise [recipe=NAME] [key.sub=value ...] [--batches 24] [--out FILE.json]

Batches are drawn, graded and differentiated as a run of these settings would, all under the weights that it begins
with, and no step is taken. With g_i the gradient of batch i, of N independent ones, over the adapter's parameters:

- signal: |E g|^2, by the inner products of different batches, sum over i != j of g_i g_j / (N (N - 1));
- noise: the trace of g's covariance, the mean of |g_i|^2 less the signal;
- noise over signal, of an update. It does not depend on how a method scales its loss; half of it means that half as
  large a batch gives as good a direction. Times what an update costs, in forward-equivalents, it compares methods.

Both parts are there: the noise of prompts and completions, and that of what a method draws to score them
(``learner.bench.variance`` tells them apart for AGRPO). A method that learns from a buffer has no independent batches,
and is refused. Intervals: 95 %, Bayesian bootstrap over batches.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from learner.runs.atomic import atomic_write_text
from learner.runs.stopping import exit_status
from learner.settings.command import SettingsParser
from learner.settings.run import help_text, load_config
from rewards.errors import ConfigError
from rollout.process import prepare_process

FEWEST = 4


def told(found: dict[str, Any]) -> str:
    """In a few lines."""
    value, (low, high) = found["value"], found["interval"]
    ratio = "not known: the signal is lost in the noise" if value is None else f"{value:.3g}"
    lines = [
        f"{found['objective']}: {found['batches']} batches",
        f"noise over signal  {ratio} [{_end(low)}, {_end(high)}]",
        f"an update costs    {found['update_fe']:,.0f} forward-equivalents at most",
    ]
    if value is not None:
        lines.append(f"together           {found['signal_fe']:,.0f} forward-equivalents for as much signal as noise")
    return "\n".join(lines)


def _end(value: float | None) -> str:
    return "unbounded" if value is None else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 for wrong settings, 128 + signal when asked to stop."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    about = "The noise of a method's gradient under the weights that a run of these settings begins with."
    parser = SettingsParser("python -m learner.bench.gradient_noise", about, help_text)
    parser.add_argument("--batches", type=int, default=24, metavar="N", help="independent batches (24)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    options = parser.read(argv)
    if options.batches < FEWEST:
        parser.error(f"--batches {options.batches} is too few to tell noise from signal; give {FEWEST} or more")
    config = load_config(options.settings)
    if config.objective.phases() is not None:
        raise ConfigError(
            f"objective.type={config.objective.type} learns from a buffer, so its batches are not independent and have "
            "no variance of this kind; take another method"
        )
    if config.rollout.max_staleness > 0:
        raise ConfigError(
            f"rollout.max_staleness={config.rollout.max_staleness} would draw ahead; the noise is measured of batches "
            "under one version, so set it to 0"
        )
    from learner.bench.noise import measured  # torch and Ray take seconds to import
    from learner.control.launch import run

    # A batch is what an iteration draws, and a run draws for no more than it has.
    config = config.model_copy(update={"run": config.run.model_copy(update={"iterations": options.batches})})
    found: dict[str, Any] = {}
    status = run(config, options.settings, look=partial(measured, config, options.batches, found))
    if status == 0:
        print(told(found))
        if options.out is not None:
            atomic_write_text(options.out, json.dumps(found, indent=1, allow_nan=False) + "\n")
    return status


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
