"""Train: ``python -m learner.main [recipe=NAME] [key.sub=value ...] [--dry-run | --print-config | --help]``.

Only parses: what is defined here would be called ``__main__.X`` on Ray's workers, so the work is in
``learner.control.launch``.
"""

import sys
from collections.abc import Sequence
from functools import partial

from learner.runs.life import show_life
from learner.runs.stopping import exit_status, interrupting
from learner.settings.command import SettingsParser
from learner.settings.run import check_paths, dump_config, help_text, in_ray_job, load_config
from rollout.process import prepare_process

DESCRIPTION = """Train as a recipe and settings say.

resume=auto (short for run.resume=auto) goes on with the run that run.name names, or that was started last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when the run failed, 2 for wrong settings, 128 + signal when asked to stop."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    options = _parser().read(argv)
    config = load_config(options.settings)
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    check_paths(config, in_ray_job())
    if config.run.restarts and not options.dry_run:
        from learner.control.supervisor import supervise

        silent_s = config.timeouts.heartbeat
        return supervise(config.run, "run", config.task.name, options.settings, silent_s=silent_s)
    show_life()
    with interrupting():
        from learner.control.controller import Controller  # torch and Ray take seconds to import
        from learner.control.launch import run

        return run(config, options.settings, look=Controller.dry_run if options.dry_run else None)


def _parser() -> SettingsParser:
    parser = SettingsParser("python -m learner.main", DESCRIPTION, help_text)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="draw and grade the first batch, print two rollouts and its statistics, and end",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as JSON, and end")
    return parser


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
