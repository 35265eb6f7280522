"""The rank that learns from groups of trajectories.

Shapes: N scored positions and Z views of one forward.
"""

from collections.abc import Sequence

import ray
import torch

from learner.likelihood.scorer import score
from learner.likelihood.views import build_batch
from learner.objectives import make_objective
from learner.objectives.statistics import Statistics
from learner.ranks.plan import Forward, UpdatePlan, plan_update
from learner.ranks.rank import Rank
from learner.ranks.scored import ScoredView, recorded_groups, scored_views
from learner.settings.run import RunConfig
from rewards.errors import TrajectoryError
from rollout.trajectory import TrajectoryGroup
from rollout.waits import bounded_get


class LearnerRank(Rank):
    """Learns from groups of trajectories. An update's ``refs`` are its groups by ascending group id, its
    ``update_index`` the number among the updates on the same groups."""

    config: RunConfig

    def __init__(self, config: RunConfig, model_path: str, rank: int, world: int) -> None:
        super().__init__(config, model_path, rank, world)
        self.objective = make_objective(config.objective)
        self._kept: tuple[int, ...] = ()
        self._seen: list[ScoredView] = []

    def _work(self, refs: Sequence[ray.ObjectRef], update_index: int) -> tuple[UpdatePlan, list[TrajectoryGroup]]:
        groups = self._groups(refs)
        plan = plan_update(
            groups,
            objective=self.objective,
            run_seed=self.config.run.seed,
            update_index=update_index,
            eos_ids=(self.family.eos_token_id,),
            ranks=self.world,
            views_per_forward=self.config.learner.views_per_forward,
        )
        self._kept, self._seen = recorded_groups(plan.credit, self.config.samples_per_iteration), []
        return plan, groups

    def _scored(self) -> tuple[ScoredView, ...]:
        return tuple(self._seen)

    def _loss(self, forward: Forward, data: list[TrajectoryGroup]) -> tuple[torch.Tensor, Statistics]:
        temperature = data[0].sampler.temperature
        batch = build_batch(forward, data, mask_id=self.family.mask_token_id, pad_id=self.family.pad_token_id)
        ref_logp_N = ref_position_logp_Z = None
        if self.objective.needs_reference:
            with torch.no_grad(), self.engine.module.disable_adapter():
                reference = score(self.engine, batch, family=self.family, temperature=temperature)
            ref_logp_N, ref_position_logp_Z = reference.logp_N, reference.position_logp_Z
        scores = score(self.engine, batch, family=self.family, temperature=temperature)
        loss, statistics = self.objective.loss(
            scores.logp_N,
            ref_logp_N,
            batch,
            position_logp_Z=scores.position_logp_Z,
            ref_position_logp_Z=ref_position_logp_Z,
        )
        self._seen += scored_views(batch, scores, data, self._kept)
        real_N = torch.from_numpy(batch.weight > 0).to(scores.mass_N.device)
        inside = Statistics(means={"support_mass": (float(scores.mass_N[real_N].sum()), float(real_N.sum()))})
        return loss, Statistics.merged([statistics, inside])

    def _groups(self, refs: Sequence[ray.ObjectRef]) -> list[TrajectoryGroup]:
        who = f"the object store for learner rank {self.rank}'s {len(refs)} trajectory groups"
        groups: list[TrajectoryGroup] = bounded_get(refs, who=who, timeout_s=self.config.timeouts.update)
        samplers = {group.sampler for group in groups}
        for sampler in samplers:
            if problems := self.config.objective.refuses(sampler):
                raise TrajectoryError(f"a group sampled at temperature {sampler.temperature:g}: {'; '.join(problems)}")
        # The law is read off the first group; a run samples all groups in one way (``Feed``).
        assert len(samplers) == 1, f"groups of different samplers in one update: {samplers}"
        return groups
