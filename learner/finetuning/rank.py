"""The learner group on demonstrations: the same ranks, adapter and optimizer step as for trajectories."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch

from learner.finetuning.data import Example
from learner.finetuning.noising import NoisedExample, held_out_draws, noised
from learner.finetuning.packing import PackedForward, PackedPlan, build_tokens, plan_rows
from learner.finetuning.settings import SftConfig
from learner.likelihood.scorer import restricted_logp
from learner.objectives.statistics import Statistics
from learner.ranks.group import LearnerGroup
from learner.ranks.rank import LossPart, Rank, tells_when_full
from rollout.copies import in_one_copy
from rollout.waits import bounded_get


@dataclass(frozen=True)
class UpdateBatch:
    """What one optimizer step learns from."""

    examples: tuple[Example, ...]
    epochs: tuple[int, ...]
    """Which epoch shows each; an update may straddle two."""


class SftRank(Rank):
    """Learns from demonstrations. An update's ``refs`` hold one ``UpdateBatch``; its draws are those of epoch and
    example, so ``update_index`` names nothing."""

    config: SftConfig

    @tells_when_full
    def held_out(self, refs: Sequence[ray.ObjectRef[Any]]) -> Statistics:
        """This rank's share of the held-out loss, ``held_out/loss``; ``refs`` hold one tuple of examples."""
        examples: tuple[Example, ...] = self._fetched(refs)
        sequences = [draw for example in examples for draw in held_out_draws(example, **self._noise())]
        self.engine.eval()
        try:
            with torch.no_grad():
                plan, parts = self._plan(sequences), []
                for forward in plan.forwards[self.rank]:
                    loss, figures = self._loss(forward, sequences)
                    if forward.live:
                        share = sum(self._size(sequences[i]) for row in forward.rows for i in row)
                        parts += [Statistics(means={"held_out/loss": (float(loss), share)}), _renamed(figures)]
        finally:
            self.engine.train()
        return Statistics.merged(parts)

    def _remedy(self) -> str:
        """Nobody plans the memory of a fine-tuning run; the order is that of ``learner.plan``."""
        learner, rows = self.config.learner, self.config.sft.rows_per_forward
        if not learner.activation_checkpointing:
            change = "learner.activation_checkpointing=true"
        elif rows > 1:
            change = f"sft.rows_per_forward={rows // 2}"
        elif learner.dtype != "bfloat16":
            change = f"learner.dtype=bfloat16 learner.zero_stage={max(1, learner.zero_stage)}"
        elif self.config.model.quantization is None:
            change = f"model.quantization=nf4 learner.zero_stage={min(2, learner.zero_stage)}"
        else:
            change = f"data.max_tokens={self.config.data.max_tokens // 2}"
        return f"change first: {change}"

    def _work(self, refs: Sequence[ray.ObjectRef[Any]], update_index: int) -> tuple[PackedPlan, list[NoisedExample]]:
        batch: UpdateBatch = self._fetched(refs)
        pairs = zip(batch.examples, batch.epochs, strict=True)
        sequences = [noised(example, epoch=epoch, **self._noise()) for example, epoch in pairs]
        return self._plan(sequences), sequences

    def _losses(self, forward: PackedForward, data: list[NoisedExample]) -> Iterator[LossPart]:
        loss, statistics = self._loss(forward, data)
        yield LossPart(loss, loss.detach(), statistics)

    def _loss(self, forward: PackedForward, data: list[NoisedExample]) -> tuple[torch.Tensor, Statistics]:
        batch = build_tokens(
            forward,
            data,
            by_example=self._by_example,
            mask_id=self.family.mask_token_id,
            pad_id=self.family.pad_token_id,
        )
        device = next(self.engine.module.parameters()).device
        input_ids, mask, logit_rows, targets_N = in_one_copy(
            device, batch.input_ids, batch.attention_mask, batch.score_rows - self.family.logit_shift, batch.targets
        )
        if batch.attention_mask is not None and batch.attention_mask.max() <= 1:
            mask = mask.bool()  # nothing is packed, and the model need not look
        logits_NV = self.engine(input_ids=input_ids, attention_mask=mask, logit_rows=logit_rows).logits
        # The policy's own law, which never draws the mask token.
        law = restricted_logp(logits_NV, targets_N, None, temperature=1.0, mask_token_id=self.family.mask_token_id)
        loss = -(torch.from_numpy(batch.weight).to(device, law.logp_N.dtype) * law.logp_N).sum()
        if not forward.live:
            return loss, Statistics()
        nll, scored = -float(law.logp_N.detach().sum(dtype=torch.float64)), float(batch.targets.size)
        return loss, Statistics(means={"nll_masked": (nll, scored)}, totals={"scored_tokens": scored})

    def _plan(self, sequences: list[NoisedExample]) -> PackedPlan:
        return plan_rows(
            sequences,
            capacity=self.config.data.max_tokens,
            packing=self.config.sft.packing,
            by_example=self._by_example,
            ranks=self.world,
            rows_per_forward=self.config.sft.rows_per_forward,
        )

    @property
    def _by_example(self) -> bool:
        return self.config.sft.normaliser == "example"

    def _size(self, sequence: NoisedExample) -> float:
        return 1.0 if self._by_example else float(sequence.completion_ids.size)

    def _noise(self) -> dict[str, Any]:
        config = self.config
        return {
            "sft": config.sft,
            "seed": config.run.seed,
            "eos_token_id": self.family.eos_token_id,
            "longest": config.data.max_tokens,
        }

    def _fetched(self, refs: Sequence[ray.ObjectRef[Any]]) -> Any:
        (ref,) = refs
        who = f"the object store for learner rank {self.rank}'s demonstrations"
        return bounded_get(ref, who=who, timeout_s=self.config.timeouts.update)


class SftGroup(LearnerGroup):
    """A learner group of ``SftRank``; the arguments are those of ``LearnerGroup``."""

    def __init__(self, config: SftConfig, model_path: str, **started: Any) -> None:
        super().__init__(config, model_path, rank_type=SftRank, **started)

    def held_out(self, refs: Sequence[ray.ObjectRef[Any]]) -> dict[str, float]:
        """The held-out loss, divided as in training, and its unweighted negative log-likelihood per masked token."""
        parts: list[Statistics] = self._all("held_out", list(refs), limit=self.config.timeouts.evaluate)
        return Statistics.merged(parts).values()


def _renamed(figures: Statistics) -> Statistics:
    return Statistics(means={f"held_out/{name}": value for name, value in figures.means.items()})
