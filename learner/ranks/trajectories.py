"""The rank that learns from groups of trajectories.

Shapes: N scored positions and Z views of one forward, R completions of the update.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from learner.likelihood.scorer import PolicyScores, Scores, joined, score
from learner.likelihood.views import Law, Unit, View, ViewBatch, build_batch, pad_view
from learner.objectives import make_objective
from learner.objectives.base import FinalCredit, Remeasured, RowSums, UpdateContext, Valued, Weighed
from learner.objectives.rewards import seen_rewards
from learner.objectives.statistics import Statistics
from learner.planning.remedy import remedy
from learner.ranks.heads import PromptHead, ThresholdHead, TokenHead, make_head, prompt_view
from learner.ranks.optim import export_state, inner_optimizer, updates_applied
from learner.ranks.phases import PhaseWeights, TrainedWeights
from learner.ranks.plan import Forward, UpdatePlan, deal, plan_update
from learner.ranks.rank import LossPart, Plan, PublishedAdapter, Rank
from learner.ranks.scored import ScoredView, recorded_groups, scored_views
from learner.settings.run import RunConfig
from rewards.errors import TrajectoryError
from rollout.adapters import HEAD, AdapterState, digest, pack
from rollout.messages import GroupRef
from rollout.seeds import derive_seed
from rollout.trajectory import TrajectoryGroup
from rollout.waits import bounded_get


class LearnerRank(Rank):
    """Learns from groups of trajectories. An update's ``refs`` are its groups by ascending group id, its
    ``update_index`` the number among the updates on the same groups.

    A rank fetches the outlines of all groups, of which it makes the plan, and whole those whose tokens it scores by
    truncated laws.
    """

    config: RunConfig

    def __init__(self, config: RunConfig, model_path: str, rank: int, world: int) -> None:
        super().__init__(config, model_path, rank, world)
        self.objective = make_objective(config.objective)
        self._old: dict[int, list[Scores]] = {}
        """by update index of this batch: each forward's scores under the weights that the batch began with"""
        self._update_index = 0
        self._phase = 0
        self._phase_weights: PhaseWeights | None = None
        self._head: PromptHead | TokenHead | None = None
        self._applied = 0
        """optimizer steps before the present update"""
        self._refs: Sequence[GroupRef] = ()
        """of the present update"""
        self._final: FinalCredit | None = None
        self._sums: RowSums | None = None
        self._values_read: list[np.ndarray] | None = None
        """of each group's ``valued`` views; None where there are none"""
        self._kept: tuple[int, ...] = ()
        self._seen: list[ScoredView] = []

    def start(self, address: str, adapter: AdapterState | None, shard: bytes | None) -> dict[str, Any]:
        described, self._head = super().start(address, adapter, shard), None
        if (spec := self.objective.needs.head) is not None:
            seed = derive_seed(self.config.run.seed, "head")
            thresholds = self.config.rollout.sampler.threshold
            self._head = make_head(self.engine.module, self.family, spec, seed=seed, thresholds=thresholds)
            if shard is not None:
                self._head.restore(load_safetensors(shard))
        return described

    def publish(self) -> PublishedAdapter | None:
        published = super().publish()
        if published is None or not isinstance(self._head, ThresholdHead):
            return published
        head = pack({HEAD + name: parameter for name, parameter in self._head.net.named_parameters()})
        state = {**published.state, **head}
        return replace(published, state=state, digest=digest(state))

    def export(self) -> bytes:
        head = {} if self._head is None else self._head.state()
        return save_safetensors({**export_state(self.engine), **head})

    def enter_phase(self, number: int, state: Mapping[str, AdapterState] | None) -> None:
        """Begin a phase, of a method that learns in them.

        Args:
            number: of the phase, from 0.
            state: what ``commit`` gave in the middle of it; None at its begin.
        """
        phases = self.config.objective.phases()
        assert phases is not None, f"{self.config.objective.type} learns in no phases"
        first, self._phase = self._phase_weights is None, number
        if self._phase_weights is None:
            trained = TrainedWeights(self.engine.module, self.config.learner.zero_stage)
            self._phase_weights = PhaseWeights(trained, phases.decay)
        if state is not None:
            self._phase_weights.restore(state)
        elif not first:
            self._phase_weights.next()
            inner_optimizer(self.engine).state.clear()

    def _remedy(self) -> str:
        return remedy(self.config, "learner rank")

    def phase_state(self) -> dict[str, AdapterState]:
        return {} if self._phase_weights is None else self._phase_weights.state()

    def _accumulate(self, plan: Plan, data: list[TrajectoryGroup]) -> tuple[Statistics, float]:
        head = self._head
        if head is None:
            return super()._accumulate(plan, data)
        if isinstance(head, PromptHead):
            self._read_prompts(head, data)
        head.zero_grad()
        found = super()._accumulate(plan, data)
        self._applied = updates_applied(self.engine)
        if not head.reduce(self.world):
            inner_optimizer(self.engine).refuse_step()
        return found

    def _read_prompts(self, head: PromptHead, groups: list[TrajectoryGroup]) -> None:
        units = [(prompt_view(group, index),) for index, group in enumerate(groups)]
        shares = deal(units, self.world, self.config.learner.views_per_forward, pad=(pad_view(groups[0]),))
        batches = [batch for forward in shares[self.rank] for batch in self._passes(forward, groups)]
        head.read(batches, groups, lambda batch: self._score([batch]))

    def _stepped(self) -> None:
        if self._head is not None and updates_applied(self.engine) > self._applied:
            learner = self.config.learner
            schedule = inner_optimizer(self.engine).param_groups[0]["lr"] / learner.lr
            self._head.step(schedule, learner.max_grad_norm)
        if self._phase_weights is not None:
            self._phase_weights.updated()

    def _work(self, refs: Sequence[GroupRef], update_index: int) -> tuple[UpdatePlan, list[TrajectoryGroup]]:
        self._refs, groups = refs, self._outlines(refs)
        self._final = self._final_credit(groups, update_index)
        plan = self._plan(groups, update_index)
        self._complete(groups, [view for forward in plan.forwards[self.rank] for view in forward.views])
        self._update_index = update_index
        if update_index == 0 and self.objective.needs.old:
            self._old = {
                later: self._scored_now(self._plan(groups, later), groups)
                for later in range(1, self.config.learner.updates_per_batch)
            }
        self._kept, self._seen = recorded_groups(plan.credit, self.config.samples_per_iteration), []
        return plan, groups

    def _plan(self, groups: Sequence[TrajectoryGroup], update_index: int) -> UpdatePlan:
        return plan_update(
            groups,
            objective=self.objective,
            run_seed=self.config.run.seed,
            update_index=update_index,
            eos_ids=(self.family.eos_token_id,),
            ranks=self.world,
            views_per_forward=self.config.learner.views_per_forward,
            final=self._final,
            phase=self._phase,
        )

    def _final_credit(self, groups: list[TrajectoryGroup], update_index: int) -> FinalCredit:
        """Of the rewards as the settings show them to the method, and of what it measures or its head says."""
        objective, seen = self.objective, [seen_rewards(group, self.config.reward) for group in groups]
        if isinstance(objective, Valued):
            return FinalCredit(self._credit_by_values(objective, groups, seen, update_index), Statistics())
        if not isinstance(objective, Weighed):
            return FinalCredit(objective.credit(seen), Statistics())
        assert not (objective.needs.old and objective.measures_each_update), "old scores are of views planned ahead"
        context = self._context(groups, update_index)
        if update_index == 0 or objective.measures_each_update:
            wanted = [objective.measured(index, group, context) for index, group in enumerate(groups)]
            self._sums = RowSums(*self._measure(wanted, groups, (True, False)))
        assert self._sums is not None, "a batch begins with its first update"
        sums = self._sums
        if isinstance(objective, Remeasured):
            again = [objective.remeasured(index, group, context) for index, group in enumerate(groups)]
            if any(again):
                sums = sums._replace(present=self._measure(again, groups, (True,))[0])
        return objective.weigh(seen, objective.credit(seen), sums)

    def _credit_by_values(
        self, objective: Valued, groups: list[TrajectoryGroup], seen: list[TrajectoryGroup], update_index: int
    ) -> tuple[np.ndarray, ...]:
        context = self._context(groups, update_index)
        if update_index == 0:
            views = [objective.valued(index, group, context) for index, group in enumerate(groups)]
            self._values_read = self._read_values(views, groups) if any(views) else None
        credit = objective.credit(seen)
        if self._values_read is None:
            return credit
        credited = enumerate(zip(groups, credit, self._values_read, strict=True))
        return tuple(objective.credit_by_values(index, *each, context) for index, each in credited)

    def _read_values(self, views: Sequence[Sequence[View]], groups: list[TrajectoryGroup]) -> list[np.ndarray]:
        """For each group [M] float64, the mean value over the scored positions of each of its views."""
        units = [(view,) for of_group in views for view in of_group]
        shares = deal(units, self.world, self.config.learner.views_per_forward, pad=(pad_view(groups[0]),))
        start = sum(not forward.is_pad and len(forward.units) for share in shares[: self.rank] for forward in share)
        values = torch.zeros(len(units), dtype=torch.float64, device=next(self.engine.module.parameters()).device)
        for forward in shares[self.rank]:
            (batch,) = self._passes(forward, groups)
            with torch.no_grad():
                value_N = self._score([batch]).value_N
            assert value_N is not None, "values are what a head of tokens says"
            if not forward.is_pad:
                view_N = torch.from_numpy(batch.view_of_score).to(values.device)
                sums_Z = values.new_zeros(len(batch.views)).index_add(0, view_N, value_N.double())
                values[start : start + len(batch.views)] = sums_Z / torch.bincount(view_N)
                start += len(batch.views)
        torch.distributed.all_reduce(values)
        return np.split(values.cpu().numpy(), np.cumsum([len(of_group) for of_group in views])[:-1])

    def _context(self, groups: Sequence[TrajectoryGroup], update_index: int) -> UpdateContext:
        return UpdateContext(self.config.run.seed, update_index, len(groups), (self.family.eos_token_id,), self._phase)

    def _measure(
        self, wanted: Sequence[Sequence[Unit]], groups: list[TrajectoryGroup], adapted: tuple[bool, ...]
    ) -> list[tuple[np.ndarray, ...]]:
        """For each of ``adapted`` (true: the present policy, false: the base) [G] float64 of each group, the sums of
        weighted log-probs of each completion over the group's units, over all ranks."""
        units = [unit for of_group in wanted for unit in of_group]
        per_forward = self.config.learner.views_per_forward
        starts = np.cumsum([0, *(group.size for group in groups)])
        sums_AR = np.zeros((len(adapted), int(starts[-1])))
        for forward in deal(units, self.world, per_forward, pad=(pad_view(groups[0]),))[self.rank]:
            for batch in self._passes(forward, groups):
                row_Z = np.array([starts[view.group] + view.row for view in batch.views])
                for sums_R, with_adapter in zip(sums_AR, adapted, strict=True):
                    off = nullcontext() if with_adapter else self.engine.module.disable_adapter()
                    with torch.no_grad(), off:
                        logp_N = self._score([batch]).logp_N
                    np.add.at(sums_R, row_Z[batch.view_of_score], batch.weight * logp_N.double().cpu().numpy())
        shared = torch.from_numpy(sums_AR).to(next(self.engine.module.parameters()).device)
        torch.distributed.all_reduce(shared)
        return [tuple(np.split(sums_R, starts[1:-1])) for sums_R in shared.cpu().numpy()]

    def _scored_now(self, plan: UpdatePlan, groups: list[TrajectoryGroup]) -> list[Scores]:
        """Each of this rank's forwards of a later update, under the present weights."""
        with torch.no_grad():
            return [self._score(self._passes(forward, groups)) for forward in plan.forwards[self.rank]]

    def _scored(self) -> tuple[ScoredView, ...]:
        return tuple(self._seen)

    def _backwards(self, forward: Forward) -> int:
        return forward.passes

    def _losses(self, forward: Forward, data: list[TrajectoryGroup]) -> Iterator[LossPart]:
        passes, reference, teacher = self._passes(forward, data), None, None
        if self.objective.needs.teacher:
            assert self._phase_weights is not None, "a method with a teacher learns in phases"
            with torch.no_grad(), self._phase_weights.teaching():
                teacher = self._score(passes)
        if self.objective.needs.reference:
            with torch.no_grad(), self.engine.module.disable_adapter():
                reference = self._score(passes)
        if forward.passes == 1:
            policy = replace(self._score(passes), value_Z=self._values(forward))
            loss, statistics = self._loss(forward, policy, reference, teacher, passes[0])
            yield LossPart(loss, loss.detach(), statistics)
            return
        # A unit of more views than a pass may hold. The loss' slope by each log-prob comes from a pass that keeps no
        # graph; then each pass is made again and takes its part back (Gao et al., arXiv 2101.06983, section 3.2).
        with torch.no_grad():
            found = self._score(passes)
        assert found.choice_logp_Z is None and found.law_NV is None and found.value_N is None, "units of one view only"
        leaf_N = found.logp_N.requires_grad_()
        whole = self._batch(forward.views, data, [len(unit) for unit in forward.units])
        values_Z = self._values(forward)
        policy = Scores(leaf_N, found.mass_N, value_Z=values_Z)
        loss, statistics = self._loss(forward, policy, reference, teacher, whole)
        inputs = [leaf_N] if values_Z is None else [leaf_N, values_Z]
        slope_N, *slopes_Z = torch.autograd.grad(loss, inputs, allow_unused=True)
        value, start = loss.detach(), 0
        for number, batch in enumerate(passes):
            logp_n = self._score([batch]).logp_N
            end = start + logp_n.numel()
            part = (slope_N[start:end] * logp_n).sum()
            if number == 0 and values_Z is not None and slopes_Z[0] is not None:
                part = part + (slopes_Z[0] * values_Z).sum()
            yield LossPart(part, value, statistics)
            start, value, statistics = end, torch.zeros_like(value), Statistics()

    def _values(self, forward: Forward) -> torch.Tensor | None:
        return self._head.values(forward.views) if isinstance(self._head, PromptHead) else None

    def _loss(
        self,
        forward: Forward,
        policy: Scores,
        reference: Scores | None,
        teacher: Scores | None,
        batch: ViewBatch,
    ) -> tuple[torch.Tensor, Statistics]:
        """The objective's loss of a forward's units, and its figures; 0 for a pad."""
        if forward.is_pad:
            return policy.logp_N.sum(), Statistics()
        needs, old = self.objective.needs, None
        if needs.old:
            old = self._old[self._update_index][forward.number] if self._update_index else policy.detached()
        loss, statistics = self.objective.loss(PolicyScores(policy, old, reference, teacher), batch)
        self._seen += scored_views(batch, policy, self._kept)
        if needs.law is Law.RAW:
            return loss, statistics
        N = float(policy.mass_N.numel())
        mass = {"support_mass": (N if batch.support is None else float(policy.mass_N.sum()), N)}
        return loss, Statistics.merged([statistics, Statistics(means=mass)])

    def _passes(self, forward: Forward, groups: list[TrajectoryGroup]) -> list[ViewBatch]:
        """The inputs of each pass of the model."""
        if forward.passes == 1:
            return [self._batch(forward.views, groups, [len(unit) for unit in forward.units])]
        views = forward.views
        bounds = [len(views) * part // forward.passes for part in range(forward.passes + 1)]
        parts = [views[start:end] or [pad_view(groups[0])] for start, end in itertools.pairwise(bounds)]
        return [self._batch(part, groups, None) for part in parts]

    def _batch(self, views: list[View], groups: list[TrajectoryGroup], unit_sizes: list[int] | None) -> ViewBatch:
        self._complete(groups, views)
        return build_batch(
            views,
            groups,
            mask_id=self.family.mask_token_id,
            pad_id=self.family.pad_token_id,
            law=self.objective.needs.law,
            unit_sizes=unit_sizes,
        )

    def _score(self, passes: Sequence[ViewBatch]) -> Scores:
        """One forward of the model for each pass."""
        return joined([self._score_one(batch) for batch in passes])

    def _score_one(self, batch: ViewBatch) -> Scores:
        head, whole = self._head, self.objective.needs.vocabulary
        if not isinstance(head, TokenHead):
            return score(self.engine, batch, family=self.family, vocabulary=whole)
        with head.reading() as found:
            scores = score(self.engine, batch, family=self.family, vocabulary=whole)
        (hidden,) = found
        return replace(scores, value_N=head.values(hidden, batch.score_rows - self.family.logit_shift))

    def _complete(self, groups: list[TrajectoryGroup], views: Sequence[View]) -> None:
        """Put the whole groups in the place of those outlines whose supports these views need."""
        if self.objective.needs.law is Law.RAW:
            return
        lacking = [i for i in sorted({view.group for view in views if view.scored_n.size}) if groups[i].is_outline]
        fetched = self._fetched([self._refs[index].whole for index in lacking], "trajectory groups")
        for index, group in zip(lacking, fetched, strict=True):
            groups[index] = group

    def _fetched(self, refs: Sequence[ray.ObjectRef[TrajectoryGroup]], what: str) -> list[TrajectoryGroup]:
        who = f"the object store for learner rank {self.rank}'s {len(refs)} {what}"
        groups: list[TrajectoryGroup] = bounded_get(refs, who=who, timeout_s=self.config.timeouts.update)
        return groups

    def _outlines(self, refs: Sequence[GroupRef]) -> list[TrajectoryGroup]:
        groups = self._fetched([ref.outline for ref in refs], "outlines of trajectory groups")
        samplers = {group.sampler for group in groups}
        for sampler in samplers:
            if problems := self.config.objective.refuses(sampler):
                raise TrajectoryError(f"a group sampled at temperature {sampler.temperature:g}: {'; '.join(problems)}")
        # A run samples all groups in one way (``Feed``), so that one law fits an update.
        assert len(samplers) == 1, f"groups of different samplers in one update: {samplers}"
        return groups
