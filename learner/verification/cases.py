"""Reader of recorded cases of the reference AGRPO code (tests/golden/README.md defines the format).

A case is ``NN_name.npz`` and ``NN_name.json``: a training case (rollout, draws, losses, gradients) or a sampler case
(rollout with its noise). The reader turns the recorded rollout into this code base's trajectory groups, one per row
because the rows of a case may have prompts of different lengths, and knows the reference's conventions, so that
nothing else has to: masks of kept tokens instead of lists, fillers that must be found, the padding mask honoured or
not.

Shapes: B rows, P prompt width with left pads, C completion positions, V vocabulary, m steps, k draws, U tokens a step.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)

from rewards.errors import DataError
from rollout.sampling.schedule import tokens_per_step
from rollout.trajectory import SamplerSpec, TrajectoryGroup

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
HEAD_WIDTH = 16  # not in the recorded weights; every recorded model has it

TopP = Annotated[float, Field(gt=0, le=1)]
Natural = Annotated[int, Field(ge=0)]
FileName = Annotated[str, Field(pattern=r"^[\w.-]+$")]
AnySettings = TypeVar("AnySettings", bound=BaseModel)


class _Settings(BaseModel):
    """Settings of a case's JSON file; its other entries are for people."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    V: PositiveInt
    B: PositiveInt
    mask: Natural
    eos: Natural
    pad_id: Natural
    top_k: Natural | None = None
    """0 and null: off, also of top_p."""
    top_p: TopP | None = None
    impl: Literal["hf", "fast"] = "hf"
    """hf: the padding mask was honoured; fast: it was ignored."""
    base_weights: FileName = "weights_base.npz"


class TrainingSettings(_Settings):
    """Settings of cases 01 to 14, under the recorded names."""

    lora_r: Natural
    lora_alpha: PositiveFloat
    lora_targets: tuple[str, ...] | None
    importance_sampling: Literal["uniform", "entropy"]
    T: PositiveFloat
    C: PositiveInt
    BL: PositiveInt
    m: PositiveInt
    G: PositiveInt
    k: PositiveInt
    beta: NonNegativeFloat
    eps: Annotated[float, Field(gt=0, le=1)]
    eps_high: PositiveFloat | None = None
    GA: PositiveInt

    @field_validator("lora_targets")
    @classmethod
    def _the_seven(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets is not None and sorted(targets) != sorted(LORA_TARGETS):
            raise ValueError(f"LoRA is read on {', '.join(LORA_TARGETS)} and the head only")
        return targets


class SamplerSettings(_Settings):
    """Settings of cases 20 to 22, under the recorded names."""

    temperature: NonNegativeFloat
    unmasking: Literal["low_confidence", "random", "entropy"]
    max_completion_length: PositiveInt
    block_length: PositiveInt
    sampling_steps: PositiveInt


@dataclass(frozen=True)
class Arrays:
    """Named arrays of a file, checked as they are taken."""

    by_name: Mapping[str, np.ndarray]

    def take(
        self,
        name: str,
        shape: tuple[int | None, ...],
        kind: Literal["integers", "numbers"] = "numbers",
        *,
        within: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """The array of this name, numbers as float64 and integers as int64.

        Args:
            shape: None for a size that may be any but 0.
            within: the smallest and the largest value allowed.

        Raises:
            DataError: naming the array, when there is none, or one of another shape, type or range.
        """
        if name not in self.by_name:
            raise DataError(f"array {name} is missing")
        array = self.by_name[name]
        fits = len(array.shape) == len(shape) and all(
            size == want or (want is None and size) for size, want in zip(array.shape, shape, strict=True)
        )
        if not fits:
            wanted = str(tuple("any" if size is None else size for size in shape)).replace("'", "")
            raise DataError(f"array {name} has shape {array.shape}, expected {wanted}")
        if array.dtype.kind not in ("iub" if kind == "integers" else "iubf"):
            raise DataError(f"array {name} is of type {array.dtype}, expected {kind}")
        if within is not None and not ((array >= within[0]) & (array <= within[1])).all():
            raise DataError(f"array {name} has values outside {within[0]}..{within[1]}")
        return array.astype(np.int64 if kind == "integers" else np.float64)

    def tensors(
        self, prefix: str, parameters: Mapping[str, torch.nn.Parameter], *, leading: tuple[int, ...] = ()
    ) -> dict[str, np.ndarray]:
        """The arrays called prefix + name, of the parameters' shapes after the axes ``leading``, by name.

        Raises:
            DataError: as ``take`` does, and for an array with this prefix that no parameter has.
        """
        unknown = {name for name in self.by_name if name.startswith(prefix)} - {prefix + name for name in parameters}
        if unknown:
            raise DataError(f"array {min(unknown)} belongs to no trained tensor of this model")
        return {name: self.take(prefix + name, (*leading, *p.shape)) for name, p in parameters.items()}

    def fill(self, prefix: str, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Copy ``tensors`` into the parameters."""
        with torch.no_grad():
            for name, array in self.tensors(prefix, parameters).items():
                parameters[name].copy_(torch.from_numpy(array))


@dataclass(frozen=True)
class Case:
    """A case as its two files have it, and the base weights that it names."""

    settings: TrainingSettings | SamplerSettings
    arrays: Arrays
    weights: Arrays

    @cached_property
    def rollout(self) -> "RecordedRollout":
        """The recorded completions; raises DataError as ``Arrays.take`` does."""
        s, take = self.settings, self.arrays.take
        if isinstance(s, TrainingSettings):
            (C, block, steps, temperature), law = (s.C, s.BL, s.m, s.T), ("old_logps", "old_entropies")
        else:
            C, block, steps = s.max_completion_length, s.block_length, s.sampling_steps
            temperature, law = s.temperature, ("logps", "entropies")
        if len(set(tokens_per_step(C, block, steps))) != 1:
            raise DataError(f"{steps} denoising steps don't share {C} positions equally")
        prompt_BP = take("prompt_ids", (s.B, None), "integers", within=(0, s.V - 1))
        seen_BP = take("prompt_mask", prompt_BP.shape, "integers", within=(0, 1)).astype(bool)
        if (seen_BP[:, :-1] & ~seen_BP[:, 1:]).any() or not seen_BP[:, -1].all():
            raise DataError("array prompt_mask has a pad that is not on the left")
        packed = take("sampling_masks_packed", (s.B, C, -(-s.V // 8)), "integers", within=(0, 255))
        return RecordedRollout(
            sampler=SamplerSpec(C, block, steps, "random", temperature, s.top_k or None, s.top_p or 1.0),
            eos=s.eos,
            prompt_ids=prompt_BP,
            prompt_seen=seen_BP if s.impl == "hf" else np.ones_like(seen_BP),
            completion_ids=take("completion_ids", (s.B, C), "integers", within=(0, s.V - 1)),
            unmask_steps=take("unmask_steps", (s.B, C), "integers", within=(0, steps - 1)),
            kept=np.unpackbits(packed.astype(np.uint8), -1, s.V, "little").astype(bool),
            logps=take(law[0], (s.B, C)),
            entropies=take(law[1], (s.B, C)),
        )


@dataclass(frozen=True)
class RecordedRollout:
    """Completions as the reference recorded them."""

    sampler: SamplerSpec
    """Its position rule says nothing: positions are recorded, not chosen."""
    eos: int
    prompt_ids: np.ndarray
    """[B, P] int64"""
    prompt_seen: np.ndarray
    """[B, P] bool, what the recorded model attended to."""
    completion_ids: np.ndarray
    """[B, C] int64"""
    unmask_steps: np.ndarray
    """[B, C] int64"""
    kept: np.ndarray
    """[B, C, V] bool, tokens that truncation kept; all of them at fillers."""
    logps: np.ndarray
    """[B, C] float64, 0 at fillers; entropies alike."""
    entropies: np.ndarray

    @property
    def per_step(self) -> int:
        """U, positions revealed by a step."""
        return self.sampler.completion_length // self.sampler.steps

    @cached_property
    def drawn(self) -> np.ndarray:
        """[B, C] bool: false from the block on that follows a block of EOS only, which ended the row."""
        B, C = self.completion_ids.shape
        block = self.sampler.block_length
        ended_Bn = (self.completion_ids == self.eos).reshape(B, C // block, block).all(axis=2)
        after_Bn = np.concatenate([np.zeros((B, 1), bool), np.logical_or.accumulate(ended_Bn, axis=1)[:, :-1]], axis=1)
        return ~np.repeat(after_Bn, block, axis=1)

    def schedule_breaks(self) -> np.ndarray:
        """[B, C] bool, positions that no run of the reference could have left so: a drawn one whose step belongs to
        another block or reveals more or fewer than U, a filler that isn't one."""
        C, steps = self.completion_ids.shape[1], self.unmask_steps
        block_of_C = np.arange(C) // self.sampler.block_length
        steps_per_block = self.sampler.block_length // self.per_step
        together_BC = ((steps[:, :, None] == steps[:, None, :]) & self.drawn[:, None, :]).sum(axis=2)
        as_drawn_BC = (steps // steps_per_block == block_of_C) & (together_BC == self.per_step)
        left_B1 = self.drawn.sum(axis=1, keepdims=True) // self.per_step
        blank_BC = (self.logps == 0) & (self.entropies == 0) & self.kept.all(axis=2)
        as_filled_BC = (steps == left_B1) & (self.completion_ids == self.eos) & blank_BC
        return ~np.where(self.drawn, as_drawn_BC, as_filled_BC)

    def groups(self) -> list[TrajectoryGroup]:
        """A trajectory group of each row."""
        return [self._group(row) for row in range(len(self.completion_ids))]

    def _group(self, row: int) -> TrajectoryGroup:
        C, drawn_1C = self.completion_ids.shape[1], self.drawn[[row]]
        indptr = ids = None
        if self.sampler.truncates:
            kept_CV = self.kept[row] & drawn_1C[0][:, None]
            indptr = np.concatenate([[0], kept_CV.sum(axis=1).cumsum()]).astype(np.int64)
            ids = np.nonzero(kept_CV)[1].astype(np.int32)
        logp_1C = np.where(drawn_1C, self.logps[[row]], 0).astype(np.float32)
        return TrajectoryGroup(
            group_id=row,
            problem_id="recorded",
            prompt_ids=self.prompt_ids[row][self.prompt_seen[row]].astype(np.int32),
            completion_ids=self.completion_ids[[row]].astype(np.int32),
            unmask_step=self.unmask_steps[[row]].astype(np.int16),
            unmask_rank=np.zeros((1, C), np.int16),  # the reference reveals a step's tokens at once
            drawn=drawn_1C,
            logp=logp_1C,
            logp_raw=logp_1C,
            entropy=np.where(drawn_1C, self.entropies[[row]], 0).astype(np.float32),
            support_indptr=indptr,
            support_ids=ids,
            rewards=np.zeros((1, 0), np.float32),
            reward_names=(),
            correct=np.zeros(1, bool),
            policy_version=0,
            adapter_digest="",
            sampler=self.sampler,
            seed=0,
            nfe=np.full(1, self.sampler.steps, np.int32),
        )


def case_names(folder: Path) -> list[str]:
    """Names of the cases in the folder itself, sorted; a case is there when one of its two files is."""
    return sorted({p.stem for p in folder.iterdir() if p.suffix in (".npz", ".json") and re.match(r"\d\d_", p.name)})


def read_case(folder: Path, name: str) -> Case:
    """One case with the base weights that it names.

    Raises:
        DataError: naming the file, setting or array that can't be read.
    """
    raw = read_settings(folder / f"{name}.json")
    if not raw.keys() & {"k", "sampling_steps"}:
        raise DataError(f"{name}.json has neither k (a training case) nor sampling_steps (a sampler case)")
    settings = validated(TrainingSettings, raw) if "k" in raw else validated(SamplerSettings, raw)
    return Case(settings, read_arrays(folder / f"{name}.npz"), read_arrays(folder / settings.base_weights))


def read_settings(path: Path) -> dict[str, Any]:
    """The entries of a case's JSON file. Raises DataError, naming it, when it can't be read."""
    try:
        raw: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} can't be read ({error})") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path.name} can't be read (it holds no settings by name)")
    return raw


def validated(model: type[AnySettings], raw: Mapping[str, Any]) -> AnySettings:
    """The settings as this model. Raises DataError, naming the setting, for one that is missing or not known."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"]))
        missing = first["type"] == "missing"
        given = f"{setting} is missing" if missing else f"{setting} = {first['input']!r} is not known"
        raise DataError(f"setting {given} ({first['msg']})") from error


def read_arrays(path: Path) -> Arrays:
    """All arrays of an npz file; never unpickles.

    Raises:
        DataError: naming the file, and the array where it is one that can't be read.
    """
    name = ""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {}
            for name in file.files:
                arrays[name] = file[name]
            return Arrays(arrays)
    except _UNREADABLE as error:
        part = f"array {name} of {path.name}" if name else path.name
        raise DataError(f"{part} can't be read ({error})") from error


_UNREADABLE = (
    *(OSError, EOFError, ValueError, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError),
    *(zlib.error, zipfile.BadZipFile),
)  # what numpy and zipfile raise on damaged files; AttributeError for an .npy that is not an .npz
