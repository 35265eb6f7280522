"""LLaDA-8B's shape on one GPU, with random bf16 weights made there and no Ray: the engine, then the learner.

    python -m learner.bench.gpu [--small] [--out FOLDER]
    python -m learner.bench.gpu --all [STEP ...] [--small] [--out FOLDER]

Engine: 16 rows, prompt 256, completion 384, blocks of 12, 3 tokens a step, LoRA r 64. ``forward share`` is the
operations of its forwards over the time of these forwards, against the machine's bf16 rate for a large square product;
``whole share`` divides by the whole call, sampling included. Learner: 8 completions at k 24, activation checkpointing.
Its share counts all operations that run, the checkpointing's second forward included; ``useful share`` leaves that out.
``predicted GB`` is what the plan's memory model (docs/planning.md) says of the peak beside it: weights, adapter,
gradients, activations, logits; no DeepSpeed here, and nothing of CUDA's own, which torch doesn't count either.
Bars: 60 % of the ceiling in the engine's forward, 40 % in the learner. ``--small`` does the same on the CPU, tiny.
``--all`` does something else: what is worth knowing in the first ten minutes on a GPU (``bench.first_minutes``).
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from learner.bench import report
from learner.bench.first_minutes.drive import STEPS, failed, run_all
from learner.bench.llada_8b import ENGINE_BAR, FULL, LEARNER_BAR, LEARNER_ROWS, SMALL, engine_row, learner_row
from learner.bench.measure import machine, matmul_rate
from learner.bench.policy import build_policy, warm_up
from learner.runs.stopping import exit_status
from rewards.errors import ConfigError

TABLES = {
    "Engine": [
        "rows", "forward s", "generate s", "tokens/s", "forward TF", "ceiling TF/s", "forward share", "whole share",
        "predicted GB", "peak GB",
    ],
    "Learner": [
        "completions", "k", "views", "update s", "predicted GB", "peak GB", "forward TF", "backward TF",
        "recompute TF", "ceiling TF/s",
        "share", "useful share",
    ],
}  # fmt: skip


def run(*, small: bool = False) -> dict[str, Any]:
    """Engine and learner, as ``report`` stores them.

    Raises:
        ConfigError: there is no GPU, and the small size wasn't asked for.
    """
    require_gpu(small=small)
    shape, device = (SMALL, "cpu") if small else (FULL, "cuda")
    about = machine(threads=torch.get_num_threads())
    model, family = build_policy(shape, device=device, dtype=torch.bfloat16)
    warm_up(model, train=False)
    ceiling = matmul_rate(device=device, dtype=torch.bfloat16, size=256 if small else 8192)
    engine = engine_row(model, family, shape, ceiling)
    learner = learner_row(model, family, dataclasses.replace(shape, rows=min(shape.rows, LEARNER_ROWS)), ceiling)
    bars = [
        report.bar("engine: forward's share of the matmul ceiling", engine["forward share"], ENGINE_BAR),
        report.bar("learner: share of the matmul ceiling", learner["share"], LEARNER_BAR),
    ]
    return {
        "benchmark": "gpu",
        "small": small,
        "machine": about,
        "rows": [engine, learner],
        "tables": TABLES,
        "bars": [] if small else bars,
    }


def require_gpu(*, small: bool) -> None:
    """Raises ConfigError: there is no GPU, and the small size wasn't asked for."""
    if not small and not torch.cuda.is_available():
        raise ConfigError("torch sees no GPU here; --small runs the same path on the CPU with a tiny model")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 1 when a step of ``--all`` failed; a bar that is missed is a result, not a failure."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = report.options("gpu")
    parser.add_argument(
        "--all",
        nargs="*",
        choices=STEPS,
        metavar="STEP",
        help=f"the first ten minutes on a GPU: all steps, or those named, of {', '.join(STEPS)}",
    )
    arguments = parser.parse_args(argv)
    if arguments.all is None:
        report.keep(run(small=arguments.small), arguments)
        return 0
    require_gpu(small=arguments.small)
    result = run_all(arguments.all or STEPS, small=arguments.small)
    report.keep(result, arguments)
    return 1 if failed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
