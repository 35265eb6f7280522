"""Supervised fine-tuning: ``python -m learner.sft recipe=NAME [key.sub=value ...] [--print-config | --help]``.

Trains a LoRA adapter on demonstrations, from which ``learner.main lora.adapter=RUN/adapter`` goes on with reinforcement
learning (docs/sft.md). Only parses: what is defined here would be called ``__main__.X`` on Ray's workers.
"""

import sys
from collections.abc import Sequence
from functools import partial

from learner.finetuning.settings import check_paths, help_text, load_sft_config
from learner.runs.life import show_life
from learner.runs.stopping import exit_status, interrupting
from learner.settings.command import SettingsParser
from learner.settings.run import dump_config, in_ray_job
from rollout.process import prepare_process

DESCRIPTION = """Fine-tune on demonstrations, as a recipe and settings say.

A new run needs data.train=FILE and model.path=MODEL. resume=auto (short for run.resume=auto) goes on with the run that
run.name names, or that was started last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when the run failed, 2 for wrong settings, 128 + signal when asked to stop."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = SettingsParser("python -m learner.sft", DESCRIPTION, help_text)
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as JSON, and end")
    options = parser.read(argv)
    config = load_sft_config(options.settings)
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    check_paths(config, in_ray_job())
    if config.run.restarts:
        from learner.control.supervisor import supervise

        return supervise(config.run, "sft", "sft", options.settings, silent_s=config.timeouts.heartbeat)
    show_life()
    with interrupting():
        from learner.finetuning.run import run  # torch and Ray take seconds to import

        return run(config, options.settings)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
