"""The whole method on one process, from a problem to an adapter, with the functions that a run uses.

    python docs/loop.py [ITERATIONS [FOLDER]]

A random LLaDA of 0.1 M parameters learns to write digits, without a GPU, in half a minute. FOLDER gets the adapter.
Read it from top to bottom; docs/loop.md says where a real run does the same, with more processes.

Shapes: G completions of a group, C completion positions, N scored tokens of one forward.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch

from learner.likelihood.scorer import PolicyScores, score
from learner.likelihood.views import build_batch
from learner.objectives import make_objective
from learner.objectives.base import Objective, UpdateContext
from learner.settings.methods.states import AgrpoConfig
from learner.verification.parity import write_small_model
from rewards.task import Grade, Problem, Split, Task
from rollout.adapters import adapter_parameters, digest, pack, write_peft_folder
from rollout.engines.torch import TorchEngine
from rollout.models.encoding import encode_prompt
from rollout.models.family import PolicyAdapter
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup

SEED = 0
PROBLEMS = 4  # of one iteration
GROUP_SIZE = 16  # completions of one problem; each is compared with the others
LEARNING_RATE = 3e-3
LORA = LoraSpec(r=4, alpha=8.0)
# 16 positions in 8 steps, so two tokens a step, in random order; temperature 0 would leave no law to learn from.
SAMPLER = SamplerSpec(completion_length=16, block_length=16, steps=8, position_rule="random", temperature=1.0)


class Digits(Task):
    """Write digits: in place of Sudoku, something that a random model sometimes gets a little right."""

    name: ClassVar[str] = "digits"
    components: ClassVar[tuple[str, ...]] = ("share",)

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        return [Problem(f"digits-{i}", {"first": i % 10}) for i in range(size)]

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"Write digits, as in {fields['first']}"}]

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        share = sum(character in "0123456789" for character in completion) / SAMPLER.completion_length
        return Grade(correct=share >= 1.0, components={"share": share})

    def validate_fields(self, fields: dict[str, Any]) -> None:
        assert 0 <= fields["first"] <= 9


def main(iterations: int, folder: Path | None = None) -> list[dict[str, float]]:
    """Train, and print a line per iteration; returns each iteration's mean reward and loss."""
    torch.set_num_threads(1)  # matrices this small gain nothing from a second one
    task, objective = Digits(), make_objective(AgrpoConfig(k=4))
    with TemporaryDirectory() as base:
        write_small_model(Path(base))
        # The policy twice, as in a real run: the engine writes, the other learns. What travels is the adapter.
        engine = TorchEngine(model_path=base, lora=LORA, max_rows=PROBLEMS * GROUP_SIZE)
        policy = attach_lora(load_model(base), engine.family, LORA).train()
    optimizer = torch.optim.AdamW(adapter_parameters(policy).values(), lr=LEARNING_RATE, weight_decay=0.0)
    publish(policy, engine, version=0)
    rows = []
    for iteration in range(iterations):
        problems = task.problems("train", seed=SEED, size=PROBLEMS)
        groups = grade(task, problems, write(task, problems, engine, iteration), engine)
        loss = learn(policy, optimizer, groups, objective, engine.family)
        publish(policy, engine, version=iteration + 1)
        reward = float(np.mean([group.rewards.sum(axis=1) for group in groups]))
        print(f"iteration {iteration:2d}   reward {reward:.3f}   loss {loss:+.4f}", flush=True)
        rows.append({"reward": reward, "loss": loss})
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_peft_folder(folder, pack(adapter_parameters(policy)), policy.peft_config["default"].to_dict())
    return rows


def write(task: Task, problems: Sequence[Problem], engine: TorchEngine, iteration: int) -> list[TrajectoryGroup]:
    """1. A problem becomes a prompt, and the engine denoises a group of completions for it.

    A group holds more than texts: at which step each token was written, and its log-prob at that moment.
    """
    first_id = iteration * len(problems)
    specs = [GroupSpec(first_id + i, problem, GROUP_SIZE, SEED + first_id + i) for i, problem in enumerate(problems)]
    prompts = [encode_prompt(engine.tokenizer, task.messages(problem.fields)) for problem in problems]
    return engine.generate(specs, prompts, SAMPLER)


def grade(
    task: Task, problems: Sequence[Problem], groups: Sequence[TrajectoryGroup], engine: TorchEngine
) -> list[TrajectoryGroup]:
    """2. The task grades each completion, as text, by a strict verdict and a shaped reward."""
    graded = []
    for problem, group in zip(problems, groups, strict=True):
        texts = [
            str(engine.tokenizer.decode(ids_C.tolist(), skip_special_tokens=True)) for ids_C in group.completion_ids
        ]
        grades = [task.grade(problem.fields, text) for text in texts]
        rewards_GR = np.array([[found.components[name] for name in task.components] for found in grades], np.float32)
        correct_G = np.array([found.correct for found in grades])
        group = dataclasses.replace(group, rewards=rewards_GR, reward_names=task.components, correct=correct_G)
        group.validate()
        graded.append(group)
    return graded


def learn(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[TrajectoryGroup],
    objective: Objective,
    family: PolicyAdapter,
) -> float:
    """3. One optimizer step on the groups; returns the loss."""
    # Credit: what a completion is worth next to the others of its group (AGRPO: reward minus the group's mean).
    # Views: inputs with masks, and the tokens to score in each (AGRPO: states before a few sampled denoising steps).
    context = UpdateContext(run_seed=SEED, update_index=0, groups=len(groups), eos_ids=(family.eos_token_id,))
    wanted = [
        objective.wanted(index, group, credit_G, context)
        for index, (group, credit_G) in enumerate(zip(groups, objective.credit(groups), strict=True))
    ]
    divisor = sum(part.divisor for part in wanted)  # of the whole update, however its views are cut into forwards
    total = 0.0
    for part in wanted:
        if not part.units:
            continue  # all completions of the group have the same reward: nothing to learn from it
        views = [view for unit in part.units for view in unit]
        batch = build_batch(views, groups, mask_id=family.mask_token_id, pad_id=family.pad_token_id)
        # Scores: log-probs of the recorded tokens under the current weights, on the law that they were sampled from.
        loss, _ = objective.loss(PolicyScores(score(policy, batch, family=family)), batch)
        (loss / divisor).backward()
        total += float(loss.detach()) / divisor
    optimizer.step()
    optimizer.zero_grad()
    return total


def publish(policy: torch.nn.Module, engine: TorchEngine, *, version: int) -> None:
    """4. The adapter travels to the engine, which checks the digest of what it loaded before it writes again."""
    state = pack(adapter_parameters(policy))
    engine.load_adapter(version, state, digest(state))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
