"""What a run will need, before it runs: ``python -m learner.plan [recipe=NAME] [key.sub=value ...] [options]``.

The arguments are ``learner.main``'s. docs/planning.md has the model behind the figures, and its measured errors.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from learner.planning import hardware, report
from learner.planning.fit import plan_run
from learner.planning.prompts import prompt_tokens
from learner.planning.shapes import model_shape
from learner.runs.stopping import exit_status
from learner.settings.command import SettingsParser
from learner.settings.run import RunConfig, help_text, load_config
from rewards.errors import ConfigError
from rollout.process import prepare_process

DESCRIPTION = """Memory by item, work, bytes and time of a run, and what to change first when it doesn't fit. Without
--gpus: on the Ray cluster that RAY_ADDRESS or resources.ray_address names, or on this machine.

The first line says whether it fits. Exit status: 0 it fits or that is unknown, 1 it does not (or, with "error: ..." on
standard error, can't be planned), 2 wrong settings."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when the run does not fit or can't be planned, 2 for wrong settings."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    arguments = _parser().read(argv)
    config = load_config(arguments.settings)
    found = _hardware(config, arguments)
    config, spread = _on_gpus(config, found)
    tokens, source = (arguments.prompt, "given") if arguments.prompt else prompt_tokens(config)
    plan = plan_run(
        config,
        model_shape(config),
        found,
        prompt=tokens,
        prompt_source=source,
        utilisation=arguments.utilisation,
        tflops=arguments.tflops,
    )
    if spread:
        print(spread, file=sys.stderr)
    print(report.as_json(plan) if arguments.json else report.render(plan))
    return 0 if plan.fits else 1


def _parser() -> SettingsParser:
    parser = SettingsParser("python -m learner.plan", DESCRIPTION, help_text)
    parser.add_argument("--gpus", type=_positive, help="plan for so many GPUs")
    parser.add_argument("--memory", help="of one GPU, or of the machine: 80GiB, 24GB")
    parser.add_argument("--gpu", help=f"model of GPU, for its speed and memory: {', '.join(hardware.GPUS)}")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that is reached (0.4)")
    parser.add_argument("--tflops", type=float, help="peak of one device, 10^12 operations per second")
    parser.add_argument("--prompt", type=_positive, help="tokens of the longest prompt")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _hardware(config: RunConfig, arguments: argparse.Namespace) -> hardware.Hardware:
    memory = hardware.parse_memory(arguments.memory) if arguments.memory else None
    if arguments.gpus is not None:
        return hardware.on_gpus(arguments.gpus, memory, arguments.gpu)
    if arguments.gpu is not None:
        raise ConfigError("--gpu needs --gpus, how many there are")
    if memory is not None:
        return hardware.Hardware("cpu", 0, memory, None, "the command line")
    from learner.runs.session import joins, ray_session

    if not joins(config.resources.ray_address):
        return hardware.this_machine(config)
    with ray_session(config):
        return hardware.ray_cluster(config)


def _on_gpus(config: RunConfig, found: hardware.Hardware) -> tuple[RunConfig, str]:
    """The settings, and what was assumed: GPUs are dealt out evenly where --gpus is given and the settings use none."""
    if found.device != "cuda" or hardware.uses_gpus(config):
        return config, ""
    ranks, actors = config.learner.ranks, config.rollout.wanted_actors
    of_rank = of_actor = min(1.0, found.gpus / (ranks + actors))
    if ranks > 1 and of_rank <= 0.5 and found.gpus > 0.6 * ranks:  # NCCL wants no two ranks on one GPU
        of_rank, of_actor = 0.6, min(1.0, (found.gpus - 0.6 * ranks) / actors)
    if config.resources.one_process:
        of_rank = of_actor = min(1.0, found.gpus / ranks) / 2
    changes = {"gpus_per_rank": of_rank, "gpus_per_actor": of_actor}
    resources = config.resources.model_copy(update=changes)
    device = config.learner.model_copy(update={"device": "auto"})
    told = (
        f"note: the settings put nothing on a GPU; planned as if with resources.gpus_per_rank={of_rank:.3g} "
        f"resources.gpus_per_actor={of_actor:.3g}"
    )
    return config.model_copy(update={"resources": resources, "learner": device}), told


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
