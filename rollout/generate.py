"""Write completions of one prompt: ``python -m rollout.generate --run runs/ID PROMPT``.

Only parses and checks: torch takes seconds to import, so the work is in ``rollout.generation``.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

from rewards.command import Parser, piped, reported
from rewards.errors import ConfigError, DataError
from rewards.infill import Infill, PromptForm, infill
from rollout.process import prepare_process
from rollout.trajectory import PositionRule

DESCRIPTION = """Write a completion of a prompt with a trained policy, and show it while it is unmasked, step by step.

  python -m rollout.generate --run runs/ID "Puzzle: 0321003004002100"
  python -m rollout.generate --run runs/ID --problem 3             # a held-out problem of the run, and its verdict
  python -m rollout.generate --run runs/ID --adapter none PROMPT   # what its base writes
  python -m rollout.generate --adapter FOLDER --temperature 1 --samples 4 PROMPT
  python -m rollout.generate --model GSAI-ML/LLaDA-8B-Instruct PROMPT
  python -m rollout.generate --model models/antiberty --form single --infill '["E V Q L V E S G G", 12, "W G Q G"]'

Of a run come the base, the adapter (of its newest checkpoint while it has not finished), the dtype and the sampler;
tokens are the most probable ones unless --temperature is given."""

JSON_HELP = """print one JSON object instead: model, adapter, sampler, seed, prompt, and completions, each with its
text, log-probability, steps, and its tokens in order of their places: id, text, step (from 1; null where the end was
filled in without being drawn), logp (of the law that it was drawn from)"""

STATUSES = "Exit status: 0, 1 when it failed, 2 for wrong settings or arguments, 130 when it was interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: see ``--help``."""
    try:
        with piped():
            return reported(partial(_command, argv))
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("stopped by SIGINT", file=sys.stderr)
        return 130


def _command(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    if options.run is None and options.adapter in (None, "none") and options.model is None:
        raise ConfigError("say what is to write: --run RUN, --adapter FOLDER or --model BASE; see --help")
    if options.problem is not None and options.run is None:
        raise ConfigError("--problem is a held-out problem of a run; give --run RUN")
    if not options.temperature and (options.top_k is not None or options.top_p is not None):
        raise ConfigError("--top-k and --top-p say what is drawn from; give --temperature above 0, or leave them out")
    asked = _infill(options) if options.infill is not None else _messages(options)
    if options.raw is not None and not options.raw:
        raise ConfigError("--raw is empty; give the text that the completion goes on from")
    from rollout.generation import generate

    return generate(options, asked)


def _parser() -> Parser:
    how: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": STATUSES}
    usage = "%(prog)s [--run RUN | --adapter FOLDER | --model BASE] [options] [PROMPT]"
    parser = Parser("python -m rollout.generate", usage=usage, description=DESCRIPTION, **how)
    asked = parser.add_argument_group("what is asked: one of these").add_mutually_exclusive_group(required=True)
    asked.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the user says; - reads it from standard input")
    asked.add_argument("--messages", metavar="JSON", help='a conversation: [{"role": "user", "content": "..."}, ...]')
    asked.add_argument("--problem", type=_count, metavar="N", help="the run's held-out problem N, from 0, and grade it")
    asked.add_argument("--infill", metavar="JSON", help='a text with gaps, in tokens: ["EVQLV", 12, "WGQG"]')
    asked.add_argument("--raw", metavar="TEXT", help="text that the completion goes on from, without a chat template")
    parser.add_argument(
        "--form",
        choices=get_args(PromptForm),
        default="chat",
        help="of --infill: a turn of a chat, or a text",
    )
    who = parser.add_argument_group("who writes")
    who.add_argument("--run", help="folder of a run")
    who.add_argument("--adapter", metavar="FOLDER", help="a checkpoint, or an adapter in PEFT format; none: no adapter")
    who.add_argument("--model", metavar="BASE", help="folder or hub name of the base; default: the adapter's")
    who.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    sampler = parser.add_argument_group("how; the default is the run's, or 128 tokens in 128 steps and blocks of 32")
    sampler.add_argument("--completion-length", type=_positive, metavar="N", help="tokens of a completion")
    sampler.add_argument("--block-length", type=_positive, metavar="N", help="tokens of one block; divides them")
    sampler.add_argument("--steps", type=_positive, metavar="N", help="denoising steps")
    sampler.add_argument("--position-rule", choices=get_args(PositionRule), help="which positions a step reveals")
    sampler.add_argument("--threshold", type=_share, metavar="P", help="reveal what is more probable than P instead")
    sampler.add_argument("--temperature", type=_amount, default=0.0, metavar="T", help="0, the default, is greedy")
    sampler.add_argument("--top-k", type=_positive, metavar="K", help="tokens kept before one is drawn")
    sampler.add_argument("--top-p", type=_share, metavar="P", help="probability kept before one is drawn")
    sampler.add_argument("--seed", type=_count, default=0, metavar="N", help="names the noise of tokens and positions")
    sampler.add_argument("--samples", type=_positive, default=1, metavar="N", help="completions to write (1)")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)
    return parser


def _messages(options: argparse.Namespace) -> list[dict[str, str]] | None:
    """The conversation; None where the run's problem or a raw text is the prompt."""
    if options.prompt is not None:
        said = sys.stdin.read() if options.prompt == "-" else options.prompt
        if not said.strip():
            raise ConfigError("the prompt is empty; say something")
        return [{"role": "user", "content": said}]
    if options.messages is None:
        return None
    try:
        messages = json.loads(options.messages)
    except ValueError as error:
        raise ConfigError(f"--messages is not JSON ({error})") from None
    wanted = {"role", "content"}
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(each, dict) and each.keys() == wanted for each in messages)
        and all(isinstance(text, str) for each in messages for text in each.values())
    ):
        raise ConfigError('--messages is no conversation; write [{"role": "user", "content": "..."}, ...]')
    return messages


def _infill(options: argparse.Namespace) -> Infill:
    try:
        parts = json.loads(options.infill)
    except ValueError as error:
        raise ConfigError(f"--infill is not JSON ({error})") from None
    fits = isinstance(parts, list) and all(
        isinstance(part, str)
        or type(part) is int
        or (isinstance(part, list) and all(type(length) is int for length in part))
        for part in parts
    )
    if not fits:
        raise ConfigError('--infill is no text with gaps; write ["text", 12, "text"], or [8, 12] for several lengths')
    try:
        return infill(*parts, form=options.form)
    except DataError as error:
        raise ConfigError(f"--infill: {error}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 0 or more")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 0 or more")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0 and at most 1")
    return value


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
