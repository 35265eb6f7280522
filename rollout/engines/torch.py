"""The embedded engine: denoises with the model in this process, on CPU or GPU."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from rewards.errors import ConfigError, WeightMismatch
from rollout.adapters import (
    HEAD,
    AdapterState,
    adapter_parameters,
    digest,
    head_tensors,
    load_state,
    require_loaded,
    unpack,
)
from rollout.engines.groups import OnCompletion, draw_groups
from rollout.gpu import NO_GPU, GpuManners
from rollout.malloc import keep_freed_memory
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.few_bits import Quantization
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.prompt_head import last_block, net_of, outputs_of, prompt_features
from rollout.sampling.head import LogitsHead, padded
from rollout.spans import Gap, prompt_places
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
        manners: of this process on its GPU.
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
        manners: GpuManners = NO_GPU,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        keep_freed_memory()
        manners.begin()
        self.family = policy_adapter(model_path)
        self.tokenizer = load_tokenizer(model_path)
        model: torch.nn.Module = load_model(model_path, dtype, quantization=quantization, device=device)
        if lora is not None:
            model = attach_lora(model, self.family, lora)
        self.model = model.eval()
        self.quantization = quantization
        self.device = torch.device(device)
        self.max_rows = max_rows
        self._manners = manners
        self.policy_version = -1
        self.adapter_digest = ""
        self._head: torch.nn.Module | None = None
        """what the adapter's head makes of a prompt; None without one"""

    def generate(
        self,
        groups: Sequence[GroupSpec],
        prompts: Sequence[Sequence[int]],
        sampler: SamplerSpec,
        *,
        gaps: Sequence[Sequence[Gap]] | None = None,
        branches: BranchSpec | None = None,
        on_completion: OnCompletion | None = None,
        on_step: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    ) -> list[TrajectoryGroup]:
        """As ``draw_groups``."""
        with torch.inference_mode():
            drawn = draw_groups(
                LogitsHead(padded(self._forward, self.device), self.family.mask_token_id),
                self.family,
                groups,
                prompts,
                sampler,
                held=(self.policy_version, self.adapter_digest),
                max_rows=self.max_rows,
                gaps=gaps,
                branches=branches,
                on_completion=on_completion,
                on_step=on_step,
                threshold_law=lambda prompts: self._threshold_law(prompts, sampler),
            )
        self._manners.rest()
        return drawn

    def load_adapter(
        self,
        version: int,
        adapter: AdapterState,
        expected_digest: str,
        *,
        hashed: Callable[[AdapterState], str] = digest,
    ) -> None:
        """Take over published adapter weights.

        Until the model holds these weights bit for bit, and their digest is the published one, the engine holds no
        version: nothing is ever sampled from half-loaded weights.

        Args:
            hashed: the digest of ``adapter``, from whoever has computed it.

        Raises:
            WeightMismatch: when names or shapes differ from this engine's adapter, or the digest does.
        """
        self.policy_version, self.adapter_digest = -1, ""
        load_state(self.model, adapter)
        head = {name.removeprefix(HEAD): unpack(tensor) for name, tensor in head_tensors(adapter).items()}
        self._head = net_of(head, self.device) if head else None
        beside = {} if self._head is None else {HEAD + name: p for name, p in self._head.named_parameters()}
        require_loaded({**adapter_parameters(self.model), **beside}, adapter)
        if (loaded := hashed(adapter)) != expected_digest:
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
        self._head = None
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

    def _threshold_law(self, prompts: Sequence[Sequence[int]], sampler: SamplerSpec) -> torch.Tensor:
        """[Q, K], log-probs of the sampler's thresholds for each prompt; uniform without a head."""
        assert isinstance(sampler.threshold, tuple)
        K, C = len(sampler.threshold), sampler.completion_length
        if self._head is None:
            return torch.zeros(len(prompts), K).log_softmax(-1)
        features: list[torch.Tensor] = []
        for start in range(0, len(prompts), self.max_rows):
            part = prompts[start : start + self.max_rows]
            P = max(map(len, part))
            ids = [[self.family.pad_token_id] * (P - len(p)) + [*p] + [self.family.mask_token_id] * C for p in part]
            mask = [[0] * (P - len(p)) + [1] * (len(p) + C) for p in part]
            ids_ZL, mask_ZL, none = (torch.tensor(rows, dtype=torch.int64).to(self.device) for rows in (ids, mask, []))
            with outputs_of(last_block(self.model, self.family)) as found:
                self.model(input_ids=ids_ZL, attention_mask=None if mask_ZL.all() else mask_ZL, logit_rows=none)
            features += [
                prompt_features(hidden, prompt_places(None, len(p)), len(p) + C)
                for hidden, p in zip(found[0], part, strict=True)
            ]
        law_QK: torch.Tensor = self._head(torch.stack(features)).log_softmax(-1)
        if law_QK.shape[1] != K:
            raise ConfigError(
                f"the adapter's head makes a law of {law_QK.shape[1]} thresholds, and rollout.sampler.threshold has "
                f"{K}; give as many"
            )
        return law_QK

    def _forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        rows = logit_rows - self.family.logit_shift
        return self.model(input_ids=input_ids, attention_mask=attention_mask, logit_rows=rows).logits
