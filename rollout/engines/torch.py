"""The embedded engine: denoises with the model in this process, on CPU or GPU.

Shapes: G completions of a group, C completion positions, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from rewards.errors import WeightMismatch
from rollout.adapters import AdapterState, adapter_parameters, digest, load_state, pack
from rollout.malloc import keep_freed_memory
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.few_bits import Quantization
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.sampling.denoise import Completion, Request, Tokens, denoise
from rollout.seeds import derive_seed
from rollout.trajectory import BranchSpec, GroupSpec, SamplerSpec, TrajectoryGroup


class TorchEngine:
    """A policy that can be sampled: base weights, one LoRA adapter, and the version of that adapter.

    A fresh engine holds version -1 (nothing published yet): the adapter's B matrices are 0, so it acts as the base.

    Args:
        model_path: folder or hub name of the base.
        lora: shape of the adapters that will be loaded; None for the bare base.
        max_rows: completions denoised together.
        threads: torch threads of this process; None leaves torch's choice.
        device: "cpu" or "cuda".
        dtype: "float32" or "bfloat16".
        quantization: "nf4" or "int8" for a base with quantized blocks; None for one in dtype.
    """

    def __init__(
        self,
        *,
        model_path: str,
        lora: LoraSpec | None,
        max_rows: int,
        threads: int | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        quantization: Quantization | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        keep_freed_memory()
        self.family = policy_adapter(model_path)
        self.tokenizer = load_tokenizer(model_path)
        model: torch.nn.Module = load_model(model_path, dtype, quantization=quantization, device=device)
        if lora is not None:
            model = attach_lora(model, self.family, lora)
        self.model = model.eval()
        self.quantization = quantization
        self.device = torch.device(device)
        self.max_rows = max_rows
        self.policy_version = -1
        self.adapter_digest = ""

    def generate(
        self,
        groups: Sequence[GroupSpec],
        prompts: Sequence[Sequence[int]],
        sampler: SamplerSpec,
        *,
        branches: BranchSpec | None = None,
        on_completion: Callable[[int, int, np.ndarray], None] | None = None,
        on_step: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    ) -> list[TrajectoryGroup]:
        """Draw all completions of the groups; temperature 0 decodes greedily (evaluation only).

        Args:
            prompts: token ids of each group's prompt.
            branches: which states of the completions are branched.
            on_completion: called with (group index, completion index, ids [1 + F, C] int32) as soon as one is finished:
                its own, and those of its branches' F fills in their order, states that it never reached left out.
            on_step: as ``denoise`` calls it, completions counted through all groups.

        Returns:
            Groups in request order, without rewards (R = 0) and with verdicts false: grading is the caller's.
        """
        # With shifted logits a sequence's first token would be read off the row before it.
        assert all(len(prompt) >= self.family.logit_shift for prompt in prompts), "a completion without a prompt"
        place = [(g, row) for g, group in enumerate(groups) for row in range(group.size)]
        requests = [Request(prompts[g], derive_seed(groups[g].seed, row)) for g, row in place]

        def finished(index: int, completion: Completion) -> None:
            if on_completion:
                fills = [] if completion.branches is None else [completion.branches.found_ids]
                on_completion(*place[index], np.concatenate([completion.ids[None], *fills]))

        with torch.inference_mode():
            completions = denoise(
                self._forward,
                requests,
                sampler,
                Tokens(self.family.mask_token_id, (self.family.eos_token_id,), self.family.pad_token_id),
                max_rows=self.max_rows,
                device=self.device,
                branches=branches,
                on_completion=finished,
                on_step=on_step,
            )
        drawn = iter(completions)
        return [
            self._group(group, prompt, [next(drawn) for _ in range(group.size)], sampler)
            for group, prompt in zip(groups, prompts, strict=True)
        ]

    def load_adapter(self, version: int, adapter: AdapterState, expected_digest: str) -> None:
        """Take over published adapter weights.

        Until the weights are loaded and their digest, recomputed from the model, is the published one, the engine
        holds no version: nothing is ever sampled from half-loaded weights.

        Raises:
            WeightMismatch: when names or shapes differ from this engine's adapter, or the digest does.
        """
        self.policy_version, self.adapter_digest = -1, ""
        load_state(self.model, adapter)
        loaded = digest(pack(adapter_parameters(self.model)))
        if loaded != expected_digest:
            raise WeightMismatch(
                f"adapter version {version} was published with digest {expected_digest[:12]}, "
                f"the loaded weights have {loaded[:12]}"
            )
        self.policy_version, self.adapter_digest = version, loaded

    def without_adapter(self) -> None:
        """Act as the bare base (all B matrices 0)."""
        with torch.no_grad():
            for name, parameter in adapter_parameters(self.model).items():
                if ".lora_B." in name:
                    parameter.zero_()
        self.policy_version, self.adapter_digest = -1, ""

    def describe(self) -> dict[str, Any]:
        """What this engine is, for logs and the workers table."""
        return {
            "engine": "torch",
            "family": self.family.family,
            "device": str(self.device),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "lora": isinstance(self.model, PeftModel),
            "max_rows": self.max_rows,
            "policy_version": self.policy_version,
        }

    def _forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        rows = logit_rows - self.family.logit_shift
        return self.model(input_ids=input_ids, attention_mask=attention_mask, logit_rows=rows).logits

    def _group(
        self,
        spec: GroupSpec,
        prompt: Sequence[int],
        completions: list[Completion],
        sampler: SamplerSpec,
    ) -> TrajectoryGroup:
        indptr = ids = None
        if sampler.truncates:
            cells = [kept for c in completions for kept in c.support or []]
            indptr = np.concatenate([[0], np.cumsum([len(kept) for kept in cells])]).astype(np.int64)
            ids = np.concatenate(cells).astype(np.int32)
        names = ["unmask_step", "unmask_rank", "drawn", "logp", "logp_raw", "entropy"]
        if sampler.scores_positions:
            names += ["position_logp", "position_entropy"]
        arrays: dict[str, Any] = {name: np.stack([getattr(c, name) for c in completions]) for name in names}
        if branches := [c.branches for c in completions if c.branches is not None]:
            kept = [name for name in ("step", "ids", "logp") if getattr(branches[0], name) is not None]
            arrays |= {f"branch_{name}": np.stack([getattr(b, name) for b in branches]) for name in kept}
            shape = arrays["branch_ids"].shape[:3]
            arrays |= {"branch_rewards": np.zeros((*shape, 0), np.float32), "branch_correct": np.zeros(shape, bool)}
        return TrajectoryGroup(
            group_id=spec.group_id,
            problem_id=spec.problem.id,
            prompt_ids=np.asarray(prompt, dtype=np.int32),
            completion_ids=np.stack([c.ids for c in completions]),
            **arrays,
            support_indptr=indptr,
            support_ids=ids,
            rewards=np.zeros((spec.size, 0), np.float32),
            reward_names=(),
            correct=np.zeros(spec.size, bool),
            policy_version=self.policy_version,
            adapter_digest=self.adapter_digest,
            sampler=sampler,
            seed=spec.seed,
            nfe=np.array([c.nfe for c in completions], np.int32),
        )
