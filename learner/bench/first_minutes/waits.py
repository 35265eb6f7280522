"""How often the host waits for the GPU, by torch's own count: in a denoising step, and in a learner's forward before
its backward is queued. A tiny model waits as often as a large one."""

import contextlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from learner.bench import llada_8b as bench
from learner.bench.compare import forward_loss, planned_update
from learner.bench.first_minutes.figures import Figure
from learner.bench.policy import BenchEngine, build_policy, generate, prompt_ids
from rewards.task import Problem
from rollout.trajectory import GroupSpec

MOST_OF_A_STEP, MOST_OF_A_FORWARD = 8, 4
_SAID = re.compile("synchronizing CUDA operation")


def measure(*, small: bool) -> list[Figure]:
    shape, device = bench.SMALL, "cpu" if small else "cuda"
    model, family = build_policy(shape, device=device, dtype=torch.bfloat16)
    engine = BenchEngine(model, family, max_rows=2 * shape.rows)
    prompt = prompt_ids(shape).tolist()
    # Prompts of two lengths: rows are padded, as nearly always.
    groups = [GroupSpec(index, Problem("bench", {}), shape.rows, index) for index in range(2)]
    engine.generate(groups, [prompt, prompt[1:]], shape.sampler)
    with counted(engine.device) as of_steps:
        drawn = engine.generate(groups, [prompt, prompt[1:]], shape.sampler)
    steps = max(int(group.nfe.max()) for group in drawn)

    group = generate(engine, shape)
    objective, plan = planned_update(family, group, shape, 4)
    of_forwards: Counter[str] = Counter()
    for forward in plan.forwards[0]:
        with counted(engine.device) as found:
            _, _, loss, _ = forward_loss(model, family, objective, forward, group)
        of_forwards += found
        loss.backward()
    return [
        _figure("a denoising step", of_steps, steps, MOST_OF_A_STEP),
        _figure("a learner's forward", of_forwards, len(plan.forwards[0]), MOST_OF_A_FORWARD),
    ]


@contextlib.contextmanager
def counted(device: torch.device) -> Iterator[Counter[str]]:
    """Lines at which the host waited within, with their number; none on a CPU, which waits for nobody."""
    found: Counter[str] = Counter()
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(f"{Path(w.filename).name}:{w.lineno}" for w in told if _SAID.search(str(w.message)))


def _figure(what: str, lines: Counter[str], of: int, most: int) -> Figure:
    note = ", ".join(f"{number / of:.3g} x {line}" for line, number in lines.most_common())
    return Figure(f"waits of {what}", lines.total() / of, f"<= {most}", note)
