"""Two learner ranks, by NCCL on two GPUs, at ZeRO stages 1 and 2: an update of each, and whether both have the same
gradient."""

import tempfile
import time

import torch

from learner.bench import llada_8b as bench
from learner.bench.first_minutes.figures import Figure
from learner.bench.model_free import prebuilt_group
from learner.bench.planned_cases import ONE_STEP, Case
from learner.bench.real_steps import save_model
from learner.ranks.group import LearnerGroup
from learner.runs.local_ray import local_ray
from rollout.adapters import AdapterState, unpack
from rollout.messages import put_group

RANKS, STAGES = 2, (1, 2)
MOST_DIFFERENT = 1e-5


def measure(*, small: bool) -> list[Figure]:
    if not small and torch.cuda.device_count() < RANKS:
        return [Figure("two ranks", None, note="there is one GPU")]
    gpus = {} if small else {"num_gpus": RANKS}
    with local_ray(num_cpus=RANKS, **gpus):
        found = [of_stage(stage, gpus_per_rank=0 if small else 1) for stage in STAGES]
    figures = [figure for of_one, _ in found for figure in of_one]
    difference = relative(*(gradient for _, gradient in found))
    return [*figures, Figure("gradients of both stages, relative difference", difference, f"<= {MOST_DIFFERENT:g}")]


def of_stage(stage: int, *, gpus_per_rank: int) -> tuple[list[Figure], AdapterState]:
    """Of two ranks on the Ray that is there, and the gradient of their update."""
    more = (f"learner.ranks={RANKS}", f"learner.zero_stage={stage}", f"resources.gpus_per_rank={gpus_per_rank}")
    case = Case("learner", bench.SMALL, "bfloat16", settings=(*ONE_STEP, *more))
    with tempfile.TemporaryDirectory() as folder:
        save_model(case, folder)
        config, begin = case.config(folder), time.monotonic()
        group = LearnerGroup(config, folder, adapter=None, shards=None)
        try:
            started = time.monotonic()
            refs = [put_group(prebuilt_group(**bench.SMALL.group))]
            gradient = group.gradient(refs, 0)
            report = group.update(refs, 0, config.learner.lr)
        finally:
            group.close()
    return [
        Figure(f"s until two ranks were there, stage {stage}", started - begin),
        Figure(f"s an update, stage {stage}", report.seconds, note="a tiny model"),
        Figure(f"updates applied, stage {stage}", int(report.applied), "1"),
    ], gradient


def relative(expected: AdapterState, found: AdapterState) -> float:
    """L2 norm of the difference over the norm of what was expected."""
    names = sorted(expected)
    ours, theirs = (torch.cat([unpack(state[n]).double().flatten() for n in names]) for state in (expected, found))
    return float((ours - theirs).norm() / ours.norm())
