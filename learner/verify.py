"""Checks this installation on this hardware: replay parity, exactness by enumeration, recorded cases of official code.

    python -m learner.verify [--golden DIR] [--json] [--device auto|cpu|cuda] [--dtype float32|bfloat16]

1. Replay parity: a small random model writes completions through the rollout engine; the learner's batches and scorer
   must find every log-prob again.
2. Exactness: on samplers small enough to enumerate, the expected AGRPO gradient must be (G-1)/(G m) times the gradient
   of expected reward; and estimators that are known to be biased must be found so (the negative controls).
3. With --golden DIR (a checkout has tests/golden), every recorded case NN_*.npz/.json of official code. In DIR itself,
   of AGRPO: log-probs, step probabilities, importance weights, losses, gradients, tokens. In DIR/methods/NAME, of
   another method, which NAME names (d1, wd1, coupled, ..): advantages, log-probs, ratios, losses, gradients. DIR may
   also be such a folder ``methods``, or one of those in it; the base weights lie beside a case or up to two folders
   above. The readers take the conventions of the recorded code upon themselves. Folders of methods that aren't here
   are named, and nothing else.

--json prints one document:

    schema       1
    status       0, 1 or 2, the exit status
    device, dtype, hardware, torch, seconds
    not_known    [folder of recorded cases of a method that isn't here]
    sections     [{name: "replay" | "enumeration" | "controls" | "golden",
                   checks: [{name, error: str | null, seconds, measurements: [measurement]}]}]
    measurement  {quantity, where, absolute, relative, metric: "absolute" | "relative", bound, control, passed,
                  parts?: [measurement]}

``absolute`` is the largest |ours - recorded|; ``relative`` the L2 norm of the difference over that of the record for
gradients, and the largest |ours - recorded| / |recorded| of an element for the rest (for other methods than AGRPO, see
``learner.verification.measurement``); null where it isn't finite.
``metric`` says which of the two the bound is for. A control passes when its error is above the bound. ``parts`` holds
the gradient of each tensor.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from learner.runs.stopping import exit_status
from rewards.command import Parser
from rollout.process import prepare_process

EXIT_STATUS = """exit status:
  0  every error is within its bound, and every negative control fails as it must
  1  an error is above its bound, or a control passes (also when a case can't be read)
  2  a recorded case can't be read (the others are checked all the same), or the command can't run"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print them; returns the exit status."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    options = _parser().parse_args(argv)
    import torch  # this and what follows take seconds, which --help needs none of

    from learner.verification.checks import Check, meter_on, sections, timed
    from learner.verification.recorded import Recorded, recorded_cases
    from learner.verification.report import document, hardware, status_of, table, verdict

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, quiet=options.json)
    found: dict[str, list[Check]] = {}
    recorded = Recorded([], [], []) if options.golden is None else recorded_cases(options.golden)
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of the report
        meter = meter_on(options.device, options.dtype)
        console.print(f"{hardware(meter.device)}, {meter.device} {meter.dtype}, torch {torch.__version__}")
        for name, checks in sections(meter, options.golden, recorded):
            found[name] = list(timed(checks))
            console.print(table(name, found[name]))
        if recorded.unknown:
            console.print(f"Not known, so not checked: {', '.join(recorded.unknown)}", soft_wrap=True)
    seconds, status = time.perf_counter() - started, status_of(found)
    if options.json:
        print(json.dumps(document(meter, found, recorded.unknown, seconds, status), allow_nan=False))
    else:
        console.print(verdict(found, status, seconds), soft_wrap=True)
    return status


def _parser() -> Parser:
    parser = Parser(
        "python -m learner.verify",
        description="Checks this installation on this hardware: replay parity, exactness by enumeration with negative "
        "controls, and recorded cases of the methods' official code.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--golden",
        type=lambda text: Path(text).expanduser(),
        metavar="DIR",
        help="folder of recorded cases, NN_name.npz and .json: of AGRPO, and in methods/NAME of other methods; also "
        "a folder methods, or one method's in it; a checkout has tests/golden",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): cuda where there is one"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models; bounds depend on it"
    )
    return parser


if __name__ == "__main__":
    prepare_process()
    sys.exit(main())
