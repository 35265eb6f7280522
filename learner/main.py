"""Train: ``python -m learner.main [recipe=NAME] [key.sub=value ...] [--dry-run | --print-config | --help]``.

Only parses: what is defined here would be called ``__main__.X`` on Ray's workers, so the work is in
``learner.control.launch``.
"""

import sys
from collections.abc import Sequence
from functools import partial

from learner.runs.stopping import exit_status, interrupting
from learner.settings.run import check_paths, dump_config, help_text, in_ray_job, load_config
from rewards.errors import ConfigError

USAGE = """usage: python -m learner.main [recipe=NAME] [key.sub=value ...] [option]

  resume=auto      go on with the newest run, or the one that run.name names; short for run.resume=auto

options:
  --dry-run        draw and grade the first batch, print two rollouts and its statistics, and end
  --print-config   print the resolved settings as JSON, and end
  --help           this text
"""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0, 1 when the run failed, 2 for wrong settings, 128 + signal when asked to stop."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str]) -> int:
    options = {argument for argument in argv if argument.startswith("-")}
    if options & {"--help", "-h"}:
        print(f"{USAGE}\n{help_text()}")
        return 0
    if unknown := options - {"--dry-run", "--print-config"}:
        raise ConfigError(f"unknown option {min(unknown)}; see --help")
    config = load_config([argument for argument in argv if argument not in options])
    if "--print-config" in options:
        print(dump_config(config), end="")
        return 0
    check_paths(config, in_ray_job())
    with interrupting():
        from learner.control.launch import run  # torch and Ray take seconds to import

        return run(config, dry_run="--dry-run" in options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
