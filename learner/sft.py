"""Supervised fine-tuning: ``python -m learner.sft recipe=NAME [key.sub=value ...] [--print-config | --help]``.

Trains a LoRA adapter on demonstrations, from which ``learner.main lora.adapter=RUN/adapter`` goes on with reinforcement
learning (docs/sft.md). Only parses: what is defined here would be called ``__main__.X`` on Ray's workers.
"""

import sys
from collections.abc import Sequence
from functools import partial

from learner.finetuning.settings import check_paths, help_text, load_sft_config
from learner.runs.stopping import exit_status, interrupting
from learner.settings.run import dump_config, in_ray_job
from rewards.errors import ConfigError

USAGE = """usage: python -m learner.sft [recipe=NAME] [key.sub=value ...] [option]

  data.train=FILE model.path=MODEL    are what it can't do without
  resume=auto      go on with the newest run, or the one that run.name names; short for run.resume=auto

options:
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
    if unknown := options - {"--print-config"}:
        raise ConfigError(f"unknown option {min(unknown)}; see --help")
    config = load_sft_config([argument for argument in argv if argument not in options])
    if "--print-config" in options:
        print(dump_config(config), end="")
        return 0
    check_paths(config, in_ray_job())
    with interrupting():
        from learner.finetuning.run import run  # torch and Ray take seconds to import

        return run(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
