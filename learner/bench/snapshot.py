"""A run stopped in time: its settings, base and adapter, fresh groups drawn from it, and their gradients, view by view.

No Ray: one engine in this process draws, and its model gives the gradients. Shapes: G completions of a group, m steps,
N views of a group, P trained parameters.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from learner.bench.estimators import mean_weights
from learner.likelihood.scorer import PolicyScores, score
from learner.likelihood.timesteps import StepTable, step_table
from learner.likelihood.views import View, build_batch, step_view
from learner.objectives.agrpo import Agrpo
from learner.ranks.rank import lora_spec
from learner.runs import checkpoint as checkpoints
from learner.settings.methods.states import AgrpoConfig
from learner.settings.run import RunConfig, load_dumped
from learner.supply.problems import task_problems
from rewards.errors import ConfigError
from rewards.task import Task
from rollout.adapters import adapter_parameters
from rollout.engines.torch import TorchEngine
from rollout.models.encoding import completion_text, encode
from rollout.seeds import derive_seed, numpy_generator
from rollout.trajectory import BranchSpec, GroupSpec, SamplerSpec, TrajectoryGroup


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint and the settings of its run."""

    path: Path
    config: RunConfig
    base: str
    """folder or hub name of the base model"""
    checkpoint: checkpoints.Checkpoint

    def __post_init__(self) -> None:
        assert self.objective  # refuses other methods before anything is loaded

    @property
    def objective(self) -> AgrpoConfig:
        """Raises ConfigError for a run of another method: only AGRPO samples the timesteps that are compared here."""
        if not isinstance(self.config.objective, AgrpoConfig):
            raise ConfigError(
                f"{self.path} was trained with objective.type={self.config.objective.type}, and the estimators "
                "compared here are AGRPO's; give a run with objective.type=agrpo"
            )
        return self.config.objective


@dataclass(frozen=True)
class GroupGradients:
    """All that any timestep estimator's moments need to know about one group."""

    table: StepTable
    rows_N: np.ndarray
    """[N] completion of each view; completions without a signal have none."""
    steps_N: np.ndarray
    """[N] step of each view."""
    credit_Gm: np.ndarray
    """[G, m] the advantage of each step."""
    gram_NN: np.ndarray
    """[N, N] float64, inner products of the views' gradients, each with weight 1."""
    mean_P: np.ndarray
    """[P] float32, gradient of the group's loss with every eligible step scored: the mean of all estimators."""
    forwards: float
    """Forward passes that drawing one completion took, on average."""
    correct: float
    """Share of completions with a right verdict."""


def add_arguments(parser: argparse.ArgumentParser, *, out: str, ks: str) -> None:
    """What a command on a snapshot takes.

    Args:
        out: what ``--out`` is for.
        ks: draws per completion, as ``--k`` lists them by default.
    """
    parser.add_argument("snapshot", type=Path, help="a checkpoint, or a run directory (its newest checkpoint)")
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--groups", type=int, default=128, help="prompt groups drawn")
    parser.add_argument("--k", default=ks, help="draws per completion to compare")
    parser.add_argument("--view-cost", type=float, default=2.0, help="forward passes that one view costs the learner")
    parser.add_argument("--seed", type=int, default=0, help="names the groups and the bootstrap")
    parser.add_argument("--baseline", choices=("group", "fills"), help="objective.baseline; default: the run's")
    parser.add_argument("--base", help="folder or hub name of the base; default: the one the adapter names")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))


def snapshot_of(arguments: argparse.Namespace) -> tuple[Snapshot, list[int]]:
    """The snapshot that ``add_arguments``' arguments name, with the baseline that they want, and their draws.

    Raises:
        ConfigError: for arguments that mean nothing, and as ``read_snapshot``.
    """
    if arguments.groups < 2 or arguments.view_cost <= 0:
        raise ConfigError(f"--groups {arguments.groups} must be 2 or more, --view-cost {arguments.view_cost} above 0")
    try:
        ks = sorted({int(k) for k in arguments.k.split(",")})
    except ValueError:
        ks = [0]
    if ks[0] < 1:
        raise ConfigError(f"--k {arguments.k} is not a list of draws; write --k 1,2,4,8")
    snapshot = read_snapshot(arguments.snapshot, arguments.base)
    if arguments.baseline:
        objective = snapshot.objective.model_copy(update={"baseline": arguments.baseline})
        snapshot = dataclasses.replace(snapshot, config=snapshot.config.model_copy(update={"objective": objective}))
    return snapshot, ks


def read_snapshot(path: Path, base: str | None = None) -> Snapshot:
    """A checkpoint, or the newest good one of a run directory.

    Raises:
        ConfigError: when ``path`` is neither, or the run's method is not AGRPO.
        CheckpointError: when the checkpoint is damaged.
    """
    path = path.expanduser().absolute()
    if (path / "manifest.json").is_file():
        run, found = path.parent.parent, checkpoints.load(path)
    else:
        run = path
        newest = checkpoints.newest_good(path / "checkpoints", on_damaged=print)
        if newest is None:
            raise ConfigError(f"{path} is neither a checkpoint nor a run with a good one; give RUN/checkpoints/NAME")
        found = newest
        path = checkpoints.place(path / "checkpoints", found.progress.iteration)
    base = base or found.peft_config.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"the adapter in {path} doesn't name its base; give it with --base")
    return Snapshot(path, load_dumped(run / "config.json"), base, found)


def group_gradients(snapshot: Snapshot, count: int, *, seed: int, device: str = "cpu") -> Iterator[GroupGradients]:
    """Draw ``count`` groups of training problems from the snapshot, grade them, and differentiate their views.

    Which problems and which completions is a function of ``seed``, and independent of what the run trained on.

    Raises:
        ConfigError: when the run has fewer training problems than that.
    """
    config = snapshot.config
    task = config.task.load()
    problems, _ = task_problems(config, task, on_event=lambda *_: None)
    if count > len(problems):
        raise ConfigError(f"{count} groups are more than the run's {len(problems)} training problems; lower --groups")
    engine = load_engine(snapshot, device=device)
    objective, sampler = Agrpo(snapshot.objective), config.rollout.sampler.spec()
    order = numpy_generator(seed, "variance problems").permutation(len(problems))
    specs = [
        GroupSpec(i, problems[int(order[i])], config.rollout.group_size, derive_seed(seed, "variance rollout", i))
        for i in range(count)
    ]
    together = config.rollout.prompts_per_iteration  # what an update's advantages may be a function of
    for start in range(0, count, together):
        groups = draw_graded(engine, specs[start : start + together], task, sampler, objective.config.branches(sampler))
        for group, credit_G in zip(groups, objective.credit(groups), strict=True):
            yield differentiate(engine, group, credit_G, objective)


def load_engine(snapshot: Snapshot, *, device: str) -> TorchEngine:
    """The policy at the snapshot."""
    config, progress = snapshot.config, snapshot.checkpoint.progress
    engine = TorchEngine(
        model_path=snapshot.base,
        lora=lora_spec(config),
        max_rows=config.rollout.max_rows,
        device=device,
        dtype=config.learner.dtype,
    )
    engine.load_adapter(progress.policy_version, snapshot.checkpoint.adapter, progress.adapter_digest)
    return engine


def draw_graded(
    engine: TorchEngine, specs: list[GroupSpec], task: Task, sampler: SamplerSpec, branches: BranchSpec | None = None
) -> list[TrajectoryGroup]:
    """Groups with rewards and verdicts, their branches too; graded in this process, as the tasks' contract (50 ms, no
    error) allows."""
    prompts = [encode(engine.tokenizer, task.prompt(spec.problem.fields)) for spec in specs]
    ids, gaps = [prompt.ids for prompt in prompts], [prompt.gaps for prompt in prompts]
    graded = []
    for spec, group in zip(specs, engine.generate(specs, ids, sampler, gaps=gaps, branches=branches), strict=True):

        def grades(
            ids: np.ndarray, spec: GroupSpec = spec, group: TrajectoryGroup = group
        ) -> tuple[np.ndarray, np.ndarray]:
            rows = ids.reshape(group.size, -1, ids.shape[-1]).tolist()
            texts = [completion_text(engine.tokenizer, c, group.place(row)) for row, cs in enumerate(rows) for c in cs]
            found = [task.grade(spec.problem.fields, text) for text in texts]
            rewards = np.array([[grade.components[name] for name in task.components] for grade in found], np.float32)
            return rewards.reshape(*ids.shape[:-1], -1), np.array([grade.correct for grade in found]).reshape(
                ids.shape[:-1]
            )

        rewards, correct = grades(group.completion_ids)
        graded.append(dataclasses.replace(group, rewards=rewards, reward_names=tuple(task.components), correct=correct))
        if group.branch_ids is not None:
            rewards, correct = grades(group.branch_ids)
            graded[-1] = dataclasses.replace(graded[-1], branch_rewards=rewards, branch_correct=correct)
        graded[-1].validate()
    return graded


def differentiate(
    engine: TorchEngine, group: TrajectoryGroup, credit_G: np.ndarray, objective: Agrpo
) -> GroupGradients:
    """Gradient of the objective's loss at every eligible (completion, step), one backward each, on the adapter.

    The loss and the views are the learner's own. Steps without a signal are left out, as the learner does.
    """
    table = step_table(group, objective.config.step_range, (engine.family.eos_token_id,))
    credit_Gm = np.broadcast_to(credit_G.reshape(group.size, -1), table.eligible_Gm.shape)
    rows_N, steps_N = np.nonzero(table.eligible_Gm & ((credit_Gm != 0) | objective.needs.reference))
    parameters = list(adapter_parameters(engine.model).values())
    views = [
        step_view(group, 0, int(row), int(step), credit=float(credit_Gm[row, step]), weight=1.0)
        for row, step in zip(rows_N, steps_N, strict=True)
    ]
    gradients_NP = torch.zeros(len(views), sum(p.numel() for p in parameters))
    for gradient_P, view in zip(gradients_NP, views, strict=True):
        parts = torch.autograd.grad(_loss(engine, group, objective, view), parameters)
        gradient_P.copy_(torch.cat([part.reshape(-1) for part in parts]))
    mean_N = torch.from_numpy(mean_weights(table)[rows_N, steps_N])
    wide_NP = gradients_NP.double()
    return GroupGradients(
        table=table,
        rows_N=rows_N,
        steps_N=steps_N,
        credit_Gm=credit_Gm,
        gram_NN=(wide_NP @ wide_NP.T).numpy(),
        mean_P=(mean_N @ wide_NP).float().numpy(),
        forwards=float(group.nfe.mean()),
        correct=float(group.correct.mean()),
    )


def _loss(engine: TorchEngine, group: TrajectoryGroup, objective: Agrpo, view: View) -> torch.Tensor:
    family, reference = engine.family, None
    batch = build_batch([view], [group], mask_id=family.mask_token_id, pad_id=family.pad_token_id)
    if objective.needs.reference:
        with torch.no_grad(), engine.model.disable_adapter():  # type: ignore[operator]
            reference = score(engine.model, batch, family=family)
    policy = score(engine.model, batch, family=family)
    loss, _ = objective.loss(PolicyScores(policy, reference=reference), batch)
    return loss
