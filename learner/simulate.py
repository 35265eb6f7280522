"""A run's control plane in virtual time: ``python -m learner.simulate [recipe=NAME] [key=value ...] [options]``.

docs/simulation.md says what is computed, from what, and how far it was from real runs.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from learner.planning.hardware import GPUS
from learner.runs.stopping import exit_status
from learner.settings.command import SettingsParser
from learner.simulation.settings import help_text, load_simulation
from rewards.errors import ConfigError
from rollout.process import prepare_process

DESCRIPTION = """Throughput, idle shares, staleness and network load of a run by its number of rollout actors, and how
many actors to take. The product's own ledger and feed work in virtual time; how long a lease, an update and publishing
take is given, read from a run (--run), or estimated as learner.plan does.

Exit status: 0, 1 when there is nothing to measure in a run, 2 for wrong settings."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status, see ``DESCRIPTION``."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = SettingsParser("python -m learner.simulate", DESCRIPTION, help_text)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="settings and service times of this run")
    parser.add_argument(
        "--gpu", help=f"model of GPU for what is estimated ({', '.join(GPUS)}); else this machine's CPU"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.read(argv)
    if arguments.gpu is not None and arguments.gpu not in GPUS:
        raise ConfigError(
            f"--gpu {arguments.gpu} is none of {', '.join(GPUS)}; give lease_s=... and update_s=... instead"
        )
    config, before = load_simulation(arguments.settings, arguments.run)
    from learner.simulation import report, search  # the feed brings Ray and torch with it
    from learner.simulation.replay import simulate
    from learner.simulation.times import times_of

    times = times_of(config, arguments.run, before, arguments.gpu)
    rows = [simulate(config, times, actors) for actors in config.actors]
    advice = search.advise(config, times)
    print(report.as_json(config, times, rows, advice) if arguments.json else report.render(config, times, rows, advice))
    return 0


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
