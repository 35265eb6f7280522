"""The model, prompts and settings that the engine and learner benchmarks share.

Shapes: G completions (= rows of the plain way), P prompt tokens, C completion positions, m steps, V vocabulary.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch

from learner.planning.shapes import ModelShape, llada_shape
from rewards.task import Problem
from rollout.adapters import adapter_parameters
from rollout.engines.torch import TorchEngine
from rollout.gpu import NO_GPU
from rollout.models.family import PolicyAdapter, policy_adapter
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.lora import LoraSpec, attach_lora
from rollout.seeds import numpy_generator
from rollout.trajectory import GroupSpec, PositionRule, SamplerSpec, TrajectoryGroup

RUN_SEED = 0


class Sizes(TypedDict):
    lora_r: int
    length: int


@dataclass(frozen=True)
class Shape:
    """Sizes of a benchmark. The defaults are those at which the reference's speed is on record."""

    vocabulary: int
    d_model: int = 256
    layers: int = 4
    heads: int = 4
    mlp: int = 512
    prompt: int = 64
    completion: int = 64
    block: int = 16
    steps: int = 32
    rows: int = 8
    """G, completions of the one prompt."""
    lora_r: int = 16
    views_per_forward: int = 8
    """As many rows as the plain way forwards at once."""
    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 0.95
    position_rule: PositionRule = "random"

    @property
    def group(self) -> dict[str, int]:
        """Sizes of one group, as ``model_free.prebuilt_group`` wants them."""
        return {
            "size": self.rows,
            "prompt": self.prompt,
            "completion": self.completion,
            "block": self.block,
            "steps": self.steps,
            "kept": self.top_k,
            "vocabulary": self.vocabulary,
        }

    @property
    def sampler(self) -> SamplerSpec:
        return SamplerSpec(
            self.completion,
            self.block,
            self.steps,
            self.position_rule,
            self.temperature,
            self.top_k,
            self.top_p,
        )

    @property
    def model(self) -> ModelShape:
        """The model's sizes, for counting operations and memory."""
        return llada_shape(
            {
                "d_model": self.d_model,
                "n_layers": self.layers,
                "n_heads": self.heads,
                "mlp_hidden_size": self.mlp,
                "vocab_size": self.vocabulary,
            }
        )

    @property
    def sizes(self) -> "Sizes":
        """What ``planning.flops`` wants beside the model and the rows."""
        return Sizes(lora_r=self.lora_r, length=self.length)

    @property
    def length(self) -> int:
        """L, tokens of a row."""
        return self.prompt + self.completion


class BenchEngine(TorchEngine):
    """The product's engine around a model that was built here and never lay on disk."""

    def __init__(self, model: torch.nn.Module, family: PolicyAdapter, *, max_rows: int) -> None:
        self.model, self.family = model.eval(), family
        self.device = next(model.parameters()).device
        self.max_rows = max_rows
        self._manners = NO_GPU
        self.policy_version, self.adapter_digest = 0, ""


def llada_config(shape: Shape, **more: Any) -> LLaDAConfig:
    """A LLaDA of these sizes; the last two tokens of its vocabulary are the special ones."""
    V = shape.vocabulary
    return LLaDAConfig(
        d_model=shape.d_model,
        n_layers=shape.layers,
        n_heads=shape.heads,
        mlp_hidden_size=shape.mlp,
        vocab_size=V,
        mask_token_id=V - 2,
        eos_token_id=V - 1,
        pad_token_id=V - 1,
        **more,
    )


def build_policy(
    shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, PolicyAdapter]:
    """A LLaDA with random weights, made on ``device``, and a LoRA adapter that acts (its B matrices aren't 0)."""
    config = llada_config(shape)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        family = policy_adapter(folder)
    cuda = [torch.cuda.current_device()] if device == "cuda" else []
    default = torch.get_default_dtype()
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            model = attach_lora(LLaDAModelLM(config), family, LoraSpec(shape.lora_r, float(shape.lora_r)))
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for name, parameter in adapter_parameters(model).items():
                if ".lora_B." in name:
                    parameter.normal_(std=0.02)
    return model, family


def warm_up(model: torch.nn.Module, *, train: bool) -> None:
    """A tiny forward (and backward), so that libraries have made their buffers before anything is measured; and a look
    at all weights: of a mapped file only what was looked at counts as held."""
    for parameter in model.parameters():
        parameter.detach().sum()
    ids = torch.zeros((1, 2), dtype=torch.int64, device=next(model.parameters()).device)
    rows = torch.zeros(1, dtype=torch.int64, device=ids.device)
    with torch.inference_mode(not train):
        out = model(input_ids=ids, logit_rows=rows).logits
    if train:
        out.sum().backward()
    model.zero_grad(set_to_none=True)


def prompt_ids(shape: Shape) -> np.ndarray:
    """[P] int32, random tokens."""
    return numpy_generator("bench prompt").integers(0, shape.vocabulary - 2, shape.prompt).astype(np.int32)


def generate(engine: TorchEngine, shape: Shape) -> TrajectoryGroup:
    """One group from the engine, with rewards that give every completion an advantage."""
    spec = GroupSpec(group_id=0, problem=Problem("bench", {}), size=shape.rows, seed=1)
    (group,) = engine.generate([spec], [prompt_ids(shape).tolist()], shape.sampler)
    rewards = np.linspace(0.0, 1.0, shape.rows, dtype=np.float32)[:, None]
    return dataclasses.replace(group, rewards=rewards, reward_names=("reward",))
