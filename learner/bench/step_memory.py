"""Peak memory of one engine or learner step, ours or the plain way, in a process of its own.

python -m learner.bench.step_memory '{"shape": {...}, "way": "ours", "k": 4}'      prints bytes; k 0 is the engine

"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import dataclasses
import json
import os
import subprocess
import sys

import torch

from learner.bench.compare import as_plain, our_update
from learner.bench.measure import peak_above
from learner.bench.model_free import prebuilt_group
from learner.bench.plain import plain_generate, plain_update
from learner.bench.policy import BenchEngine, Shape, build_policy, generate, warm_up
from learner.objectives.advantages import group_advantages
from learner.settings.methods.states import AgrpoConfig
from rollout.malloc import FIXED_THRESHOLD

LIMIT_S = 300.0


def memory_in_fresh_process(shape: Shape, way: str, k: int) -> int:
    """Bytes above the model's own. ``way``: ours or plain. k 0: the engine."""
    request = json.dumps({"shape": dataclasses.asdict(shape), "way": way, "k": k})
    environment = os.environ | FIXED_THRESHOLD | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "learner.bench.step_memory", request]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, f"measuring memory failed: {done.stderr[-2000:]}"
    return int(done.stdout.split()[-1])


def memory_of(shape: Shape, way: str, k: int) -> int:
    """Measure in this process, which must be fresh. The plain way does two steps or draws: each frees what it took."""
    torch.set_num_threads(1)
    model, family = build_policy(shape)
    warm_up(model, train=k > 0)
    engine = BenchEngine(model, family, max_rows=shape.rows)
    if not k and way == "ours":
        return peak_above(lambda: generate(engine, shape))
    group = generate(engine, shape) if shape.sampler.scores_positions else prebuilt_group(**shape.group)
    if not k:
        return peak_above(
            lambda: plain_generate(model, shape, group.unmask_step, mask_id=family.mask_token_id, steps=2)
        )
    if way == "ours":
        return peak_above(lambda: our_update(model, family, group, shape, k))
    draws = [list(range(k))] * shape.rows

    def plain() -> None:
        rollout = as_plain(group, shape)  # the mask that the plain way carries through its buffer
        advantages = group_advantages(group.rewards)
        mask, config = family.mask_token_id, AgrpoConfig(k=k, timestep_sampling="uniform")
        plain_update(model, shape, rollout, advantages, draws, mask_id=mask, config=config, keep=min(k, 2))

    return peak_above(plain)


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    print(memory_of(Shape(**wanted["shape"]), wanted["way"], wanted["k"]))
