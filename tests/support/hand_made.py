"""Trajectory groups written down by hand, and recorded ones, for tests of the estimator; adapters that act."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.layout import Cell, Layout
from rewards.task import Grade, Problem, Split, Task
from rollout.adapters import AdapterState, adapter_parameters, pack
from rollout.trajectory import SamplerSpec, TrajectoryGroup

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
"""What the official code computed; its README says which and in what format."""


def make_group(
    completion_ids: Any, unmask_step: Any, *, steps: int, rewards: Any = None, **fields: Any
) -> TrajectoryGroup:
    """A valid group: what isn't given is plain (all drawn, log-prob -1, entropy 1, one reward part, no support)."""
    ids = np.asarray(completion_ids, dtype=np.int32)
    unmask = np.asarray(unmask_step, dtype=np.int16)
    G, C = ids.shape
    drawn = np.asarray(fields.pop("drawn", np.ones((G, C))), dtype=bool)
    rewards_GR = np.arange(G, dtype=np.float32)[:, None] if rewards is None else np.asarray(rewards, dtype=np.float32)
    arrays: dict[str, Any] = {
        name: np.where(drawn, np.asarray(fields.pop(name, default), dtype=np.float32), 0).astype(np.float32)
        for name, default in (("logp", -1.0), ("logp_raw", -2.0), ("entropy", 1.0))
    }
    defaults: dict[str, Any] = {
        "group_id": 0,
        "problem_id": "hand-made",
        "prompt_ids": np.array([50, 51], dtype=np.int32),
        "unmask_rank": _ranks(unmask),
        "support_indptr": None,
        "support_ids": None,
        "reward_names": tuple(f"part{r}" for r in range(rewards_GR.shape[1])),
        "correct": np.zeros(G, dtype=bool),
        "policy_version": 0,
        "adapter_digest": "",
        "sampler": SamplerSpec(C, fields.pop("block_length", C), steps, "random", 1.0),
        "seed": 0,
        "nfe": np.full(G, steps, dtype=np.int32),
    }
    group = TrajectoryGroup(
        completion_ids=ids, unmask_step=unmask, drawn=drawn, rewards=rewards_GR, **arrays, **{**defaults, **fields}
    )
    group.validate()
    return group


def random_group(
    group_id: int, *, size: int = 4, length: int = 8, per_step: int = 2, prompt: int = 5
) -> TrajectoryGroup:
    """Random order, tokens, entropies, log-probs and rewards; a function of the arguments."""
    rng = np.random.default_rng([group_id, size, length, per_step, prompt])
    orders = np.stack([rng.permutation(length) // per_step for _ in range(size)])
    return make_group(
        rng.integers(1, 9, (size, length)),
        orders,
        steps=length // per_step,
        rewards=rng.integers(0, 3, (size, 2)) / 2,
        group_id=group_id,
        prompt_ids=rng.integers(50, 60, prompt).astype(np.int32),
        logp=-rng.random((size, length)),
        entropy=rng.random((size, length)),
        correct=rng.random(size) < 0.5,
    )


def recorded_case(number: str) -> tuple[TrajectoryGroup, dict[str, np.ndarray], dict[str, Any]]:
    """A recorded training case of the reference: its rows as one group, its arrays and its settings."""
    (path,) = GOLDEN.glob(f"{number}_*.npz")
    settings = json.loads(path.with_suffix(".json").read_text())
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if "/" not in name}
    kept = np.unpackbits(arrays["sampling_masks_packed"], axis=-1, count=settings["V"], bitorder="little")
    group = make_group(
        arrays["completion_ids"],
        arrays["unmask_steps"],
        steps=settings["m"],
        block_length=settings["BL"],
        rewards=arrays["rewards_per_func"],
        drawn=~kept.all(axis=-1),
        logp=arrays["old_logps"],
        entropy=arrays["old_entropies"],
    )
    return group, arrays, settings


def acting_adapter(model: torch.nn.Module, *, scale: float = 0.05) -> AdapterState:
    """The model's adapter with its B matrices drawn at random: a fresh adapter's are 0, which makes it act as the base
    and gives its A matrices no gradient."""
    generator = torch.Generator().manual_seed(5)
    return pack(
        {
            name: torch.randn(p.shape, generator=generator).to(p.dtype) * scale if ".lora_B." in name else p
            for name, p in adapter_parameters(model).items()
        }
    )


def _ranks(unmask_step: np.ndarray) -> np.ndarray:
    G, C = unmask_step.shape
    earlier = np.arange(C)[None, :] < np.arange(C)[:, None]
    same = unmask_step[:, :, None] == unmask_step[:, None, :]
    return (same & earlier).sum(axis=2).astype(np.int16)


class Numbered(Task):
    """A user's own, which shows answers that are right and fails on the others."""

    name, components, largest = "numbered", ("a",), {"a": 2.0}  # type: ignore[misc]

    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        return []

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Count."}, {"role": "user", "content": f"Number {fields['n']}?"}]

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        raise AssertionError("nothing is graded for playback")

    def validate_fields(self, fields: dict[str, Any]) -> None: ...

    def expected(self, fields: dict[str, Any]) -> str:
        return str(fields["n"])

    def layout(self, fields: dict[str, Any], completion: str, *, correct: bool) -> Layout:
        if not correct:
            raise ValueError("a user's mistake")
        return Layout("line", (Cell("", "right", 0, len(completion)),))
