"""The engine over vLLM: continuous batches without pads, tensor parallel models, quantized weights.

vLLM runs in the actor's own process, which is then good for nothing else (``shim.load_vllm``). It is asked for one
denoising step at a time, so the loop and its noise are those of every engine.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from rewards.errors import ConfigError
from rollout.adapters import AdapterState, digest
from rollout.engines.groups import OnCompletion, draw_groups
from rollout.engines.vllm.heads import WorkerHead, encoder, whole_sequences
from rollout.engines.vllm.launch import launch
from rollout.engines.vllm.settings import MERGED, VllmSettings, require_support, require_vllm
from rollout.engines.vllm.weights import Merged, Slots, Weights
from rollout.malloc import keep_freed_memory
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.lora import LoraSpec
from rollout.sampling.head import Head, LogitsHead
from rollout.spans import Gap
from rollout.trajectory import BranchSpec, GroupSpec, SamplerSpec, TrajectoryGroup


class VllmEngine:
    """As ``rollout.engines.torch.TorchEngine``, whose arguments these are.

    Raises:
        ConfigError: vLLM isn't installed, or can't do what is asked.
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
        settings: VllmSettings,
    ) -> None:
        require_vllm()
        self.family = policy_adapter(model_path)
        require_support(self.family.family, settings, adapts_head=lora is not None and lora.include_head)
        if threads is not None:
            torch.set_num_threads(threads)  # vLLM makes it the last time
        keep_freed_memory()
        self.tokenizer = load_tokenizer(model_path)
        merges = self.family.family in MERGED
        lora_r = None if lora is None or merges else lora.r
        llm = launch(model_path, self.family, settings, max_rows=max_rows, dtype=dtype, lora_r=lora_r)
        self._longest: int = llm.model_config.max_model_len
        self._weights: Weights | None = None
        self._head: Head
        if merges:
            self._head = LogitsHead(
                whole_sequences(encoder(llm, lambda: None), torch.device(device)), self.family.mask_token_id
            )
            if lora is not None:
                self._weights = Merged(llm, model_path, self.family, lora, dtype)
        elif lora is None:
            self._head = WorkerHead(encoder(llm, lambda: None), self.family.logit_shift, lambda: 0)
        else:
            slots = Slots(llm, model_path, self.family, lora)
            self._head = WorkerHead(encoder(llm, lambda: slots.request), self.family.logit_shift, lambda: slots.number)
            self._weights = slots
        self._llm, self._settings, self._device, self._dtype = llm, settings, device, dtype
        self.max_rows = max_rows
        self.policy_version = -1
        self.adapter_digest = ""

    def generate(
        self,
        groups: Sequence[GroupSpec],
        prompts: Sequence[Sequence[int]],
        sampler: SamplerSpec,
        *,
        gaps: Sequence[Sequence[Gap]] | None = None,
        branches: BranchSpec | None = None,
        on_completion: OnCompletion | None = None,
    ) -> list[TrajectoryGroup]:
        """As ``draw_groups``. Raises ConfigError when a sequence is longer than vLLM was started for."""
        longest = max((len(prompt) for prompt in prompts), default=0) + sampler.completion_length
        if longest > self._longest:
            raise ConfigError(
                f"a prompt and its completion have {longest} tokens, and vLLM was started for {self._longest}; raise "
                "rollout.vllm.max_length"
            )
        with torch.inference_mode():
            return draw_groups(
                self._head,
                self.family,
                groups,
                prompts,
                sampler,
                held=(self.policy_version, self.adapter_digest),
                max_rows=self.max_rows,
                gaps=gaps,
                branches=branches,
                on_completion=on_completion,
            )

    def load_adapter(
        self,
        version: int,
        adapter: AdapterState,
        expected_digest: str,
        *,
        hashed: Callable[[AdapterState], str] = digest,
    ) -> None:
        """As ``TorchEngine.load_adapter``: until its digest was found in what vLLM computes with, no version is held.

        Raises:
            WeightMismatch: when names or shapes differ from this engine's adapter, or the digest does.
        """
        self.policy_version, self.adapter_digest = -1, ""
        assert self._weights is not None, "an engine without LoRA is given no adapter"
        self._weights.load(adapter, expected_digest, hashed)
        self.policy_version, self.adapter_digest = version, expected_digest

    def without_adapter(self) -> None:
        """Act as the bare base."""
        self.policy_version, self.adapter_digest = -1, ""
        if self._weights is not None:
            self._weights.bare()

    def describe(self) -> dict[str, Any]:
        """What this engine is, for logs and the workers table."""
        return {
            "engine": "vllm",
            "family": self.family.family,
            "device": self._device,
            "dtype": self._dtype,
            "quantization": self._settings.quantization,
            "tensor_parallel_size": self._settings.tensor_parallel_size,
            "lora": self._weights is not None,
            "max_rows": self.max_rows,
            "policy_version": self.policy_version,
        }
