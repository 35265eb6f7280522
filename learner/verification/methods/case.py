"""Reader of recorded cases of the methods' official code (tests/golden/methods/README.md defines the format).

It turns the recorded tokens into trajectory groups, the recorded masked inputs into what is hidden, and the recorded
weights into a model with an adapter; ``learner.verification.methods.<folder>.check`` does the rest for its method.
Left pads were seen by the recorded model, so they are ordinary prompt tokens here.

Shapes: R rows, B rows of a micro-batch, P prompt tokens, C completion positions, N stored calls of the loss.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from learner.likelihood.scorer import Scores, score
from learner.likelihood.views import Law, View, ViewBatch, build_batch
from learner.verification.cases import (
    AnySettings,
    Arrays,
    FileName,
    Natural,
    read_arrays,
    read_settings,
    validated,
)
from learner.verification.measurement import Measurement, Meter
from learner.verification.policy import recorded_model
from rewards.errors import DataError
from rollout.adapters import adapter_parameters
from rollout.models.family import PolicyAdapter
from rollout.models.lora import LoraSpec, attach_lora
from rollout.trajectory import SamplerSpec, TrajectoryGroup


class MethodSettings(BaseModel):
    """What all cases have; a method reads its own with ``MethodCase.read``."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    V: PositiveInt
    P: PositiveInt
    C: PositiveInt
    G: PositiveInt = 1
    mask: Annotated[Natural, Field(validation_alias=AliasChoices("mask", "mask_id"))]
    eos: Annotated[Natural, Field(validation_alias=AliasChoices("eos", "eos_id"))]
    pad_id: Natural
    lora_r: PositiveInt | None = None
    """None, as lora_alpha: all weights were trained."""
    lora_alpha: PositiveFloat | None = None
    base_weights: FileName = "weights_base.npz"


class Call(NamedTuple):
    """A stored call of the loss, in the cases that have ``call_rows``."""

    rows: range
    """of the micro-batch"""
    weights: Literal["gen", "cur"]
    masks: int
    """index of its masks among those of the rollout"""


@dataclass(frozen=True)
class MethodCase:
    """A case as its two files have it, and the base weights that it names."""

    settings: MethodSettings
    raw: Mapping[str, Any]
    """All entries of the JSON file."""
    arrays: Arrays
    weights: Arrays

    def read(self, model: type[AnySettings]) -> AnySettings:
        """The settings of one method. Raises DataError, naming the setting that is missing or not known."""
        return validated(model, self.raw)

    @cached_property
    def completion_ids(self) -> np.ndarray:
        """[R, C] int64."""
        return self.arrays.take("completion_ids", (None, self.settings.C), "integers", within=(0, self.settings.V - 1))

    @cached_property
    def prompt_ids(self) -> np.ndarray:
        """[R, P] int64, pads included."""
        shape = (len(self.completion_ids), self.settings.P)
        return self.arrays.take("prompt_ids", shape, "integers", within=(0, self.settings.V - 1))

    @cached_property
    def completion_mask(self) -> np.ndarray:
        """[R, C] bool, up to and including the first EOS."""
        shape = self.completion_ids.shape
        return self.arrays.take("completion_mask", shape, "integers", within=(0, 1)).astype(bool)

    def groups(self, rewards_RK: np.ndarray) -> list[TrajectoryGroup]:
        """The rows in groups of G, as rollouts of one step; all that isn't recorded is neutral.

        Args:
            rewards_RK: [R, K] the components of each row's reward.

        Raises:
            DataError: when the rows make no whole groups of one prompt each.
        """
        G, R = self.settings.G, len(self.completion_ids)
        if R % G:
            raise DataError(f"array completion_ids has {R} rows, no multiple of G = {G}")
        for start in range(0, R, G):
            if (self.prompt_ids[start : start + G] != self.prompt_ids[start]).any():
                raise DataError(f"array prompt_ids has another prompt within rows {start} to {start + G - 1}")
        return [self._group(start // G, slice(start, start + G), rewards_RK) for start in range(0, R, G)]

    def _group(self, number: int, rows: slice, rewards_RK: np.ndarray) -> TrajectoryGroup:
        completion_ids = self.completion_ids[rows].astype(np.int32)
        G, C = completion_ids.shape
        zeros = np.zeros((G, C), np.float32)
        return TrajectoryGroup(
            group_id=number,
            problem_id="recorded",
            prompt_ids=self.prompt_ids[rows][0].astype(np.int32),
            completion_ids=completion_ids,
            unmask_step=np.zeros((G, C), np.int16),
            unmask_rank=np.zeros((G, C), np.int16),
            drawn=np.ones((G, C), bool),
            logp=zeros,
            logp_raw=zeros,
            entropy=zeros,
            support_indptr=None,
            support_ids=None,
            rewards=rewards_RK[rows].astype(np.float32),
            reward_names=tuple(f"recorded_{k}" for k in range(rewards_RK.shape[1])),
            correct=np.zeros(G, bool),
            policy_version=0,
            adapter_digest="",
            sampler=SamplerSpec(C, C, 1, "random", 1.0),
            seed=0,
            nfe=np.ones(G, np.int32),
        )

    def calls(self) -> list[Call]:
        """[N], the stored calls."""
        take, R = self.arrays.take, len(self.completion_ids)
        rows_N2 = take("call_rows", (None, 2), "integers", within=(0, R))
        weights_N = take("call_weights", (len(rows_N2),), "integers", within=(0, 1))
        masks_N = take("call_iter", (len(rows_N2),), "integers", within=(0, np.inf))
        if (rows_N2[:, 0] >= rows_N2[:, 1]).any():
            raise DataError("array call_rows has a micro-batch without rows")
        return [
            Call(range(int(first), int(end)), "cur" if current else "gen", int(masks))
            for (first, end), current, masks in zip(rows_N2, weights_N, masks_N, strict=True)
        ]

    def hidden(self, name: str, inputs: np.ndarray, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What is masked in recorded inputs: of the prompt [.., B, P] bool, and of the completion [.., B, C].

        Args:
            name: of the array that the inputs are from.
            inputs: [.., B, P+C] int64.
            rows: [B], which rows they are of.

        Raises:
            DataError: when a token that isn't masked is not the row's.
        """
        whole_BL = np.concatenate([self.prompt_ids[rows], self.completion_ids[rows]], axis=1)
        hidden = inputs == self.settings.mask
        if not (hidden | (inputs == whole_BL)).all():
            at = np.argwhere(~hidden & (inputs != whole_BL))[0].tolist()
            raise DataError(f"array {name} shows at {at} a token that is neither the mask nor the row's")
        return hidden[..., : self.settings.P], hidden[..., self.settings.P :]

    def batch(
        self, views: Sequence[View], groups: Sequence[TrajectoryGroup], unit_sizes: Sequence[int] | None = None
    ) -> ViewBatch:
        """``build_batch`` with the case's tokens and the raw law."""
        s = self.settings
        return build_batch(views, groups, mask_id=s.mask, pad_id=s.pad_id, law=Law.RAW, unit_sizes=unit_sizes)


def read_method_case(folder: Path, name: str) -> MethodCase:
    """One case with the base weights that it names, which lie in its folder or one of the two above.

    Raises:
        DataError: naming the file, setting or array that can't be read.
    """
    raw = read_settings(folder / f"{name}.json")
    settings = validated(MethodSettings, raw)
    places = [place / settings.base_weights for place in (folder, *folder.resolve().parents[:2])]
    weights = next((place for place in places if place.exists()), places[0])
    return MethodCase(settings, raw, read_arrays(folder / f"{name}.npz"), read_arrays(weights))


@dataclass(frozen=True)
class RecordedPolicy:
    """The recorded model with its adapter, which holds the weights of the rollout to begin with."""

    case: MethodCase
    model: torch.nn.Module
    family: PolicyAdapter
    parameters: Mapping[str, torch.nn.Parameter]
    """The trained ones, by the recorded names."""

    def use(self, weights: Literal["gen", "cur"]) -> None:
        """Put the adapter's weights of the rollout, or those of the loss, in place."""
        self.case.arrays.fill(f"{weights}/", self.parameters)

    def scores(self, batch: ViewBatch, *, vocabulary: bool = False) -> Scores:
        """With the weights in place and their gradient."""
        return score(self.model, batch, family=self.family, vocabulary=vocabulary)

    def reference(self, batch: ViewBatch, *, vocabulary: bool = False) -> Scores:
        """Without adapter and gradient."""
        assert isinstance(self.model, PeftModel), "weights without adapter have no reference"
        with torch.no_grad(), self.model.disable_adapter():
            return self.scores(batch, vocabulary=vocabulary)

    def gradient(self, loss: torch.Tensor) -> dict[str, np.ndarray]:
        """Of a scalar, by the recorded names."""
        found = torch.autograd.grad(loss, list(self.parameters.values()))
        return {name: g.float().cpu().numpy() for name, g in zip(self.parameters, found, strict=True)}


@contextmanager
def recorded_policy(case: MethodCase, meter: Meter) -> Iterator[RecordedPolicy]:
    """The model of a case: LoRA on all maps of the blocks, none on the head; its law may draw the mask token.

    Raises:
        DataError: as ``recorded_model``, and for an adapter that doesn't fit it.
    """
    s = case.settings
    if s.lora_r is None or s.lora_alpha is None:
        raise DataError(f"setting {'lora_r' if s.lora_r is None else 'lora_alpha'} is missing")
    with recorded_model(case.weights, meter, mask=s.mask, eos=s.eos, pad=s.pad_id) as (base, family):
        adapted = attach_lora(base, family, LoraSpec(s.lora_r, s.lora_alpha, include_head=False)).to(meter.device)
        policy = RecordedPolicy(case, adapted, family, adapter_parameters(adapted))
        policy.use("gen")
        yield policy


def compare_gradients(
    policy: RecordedPolicy,
    gradients: Sequence[Mapping[str, np.ndarray]],
    meter: Meter,
    *,
    quantity: str = "gradient of the loss",
    floor: float = 1.0,
) -> Measurement:
    """The gradient of each stored call against ``grad/``, which has a leading axis where there are several.

    Errors are relative to the largest recorded entry of the case, but at least to ``floor``.
    """
    leading = () if len(gradients) == 1 else (len(gradients),)
    recorded = policy.case.arrays.tensors("grad/", policy.parameters, leading=leading)
    scale = max(floor, *(float(np.abs(array).max()) for array in recorded.values()))
    tensors = tuple(
        meter.scaled(
            quantity,
            np.stack([gradient[name] for gradient in gradients]).reshape(array.shape),
            array,
            f"grad/{name}",
            scale=scale,
        )
        for name, array in recorded.items()
    )
    return dataclasses.replace(max(tensors, key=lambda tensor: tensor.relative), parts=tensors)
