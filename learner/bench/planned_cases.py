"""What ``learner.bench.planned`` measures: rollouts and updates, each where one part of the plan takes the most."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from learner.bench.policy import Shape
from learner.settings.run import RunConfig, load_config


@dataclass(frozen=True)
class Case:
    """One measurement. ``rows`` of the shape are an engine's, and the completions of a learner's group."""

    step: Literal["engine", "learner"]
    shape: Shape
    dtype: str = "float32"
    checkpointing: bool = False
    groups: int = 1
    method: str = "agrpo"
    settings: tuple[str, ...] = ()
    """Of the method, and others that differ from the shape's."""

    def config(self, model_path: str | None = None) -> RunConfig:
        """The settings of a run that does such steps."""
        shape = self.shape
        sampler = {
            "completion_length": shape.completion,
            "block_length": shape.block,
            "steps": shape.steps,
            "position_rule": shape.position_rule,
            "temperature": shape.temperature,
            "top_k": "null" if shape.top_k is None else shape.top_k,
            "top_p": shape.top_p,
        }
        given = {
            "run.iterations": 1,
            "model.path": "null" if model_path is None else model_path,
            "lora.r": shape.lora_r,
            "rollout.prompts_per_iteration": self.groups,
            "rollout.groups_per_lease": 1,
            "rollout.group_size": shape.rows,
            "rollout.max_rows": shape.rows,
            **{f"rollout.sampler.{name}": value for name, value in sampler.items()},
            "learner.views_per_forward": shape.views_per_forward,
            "learner.updates_per_batch": 2,
            "learner.dtype": self.dtype,
            "learner.activation_checkpointing": str(self.checkpointing).lower(),
            "learner.zero_stage": 0 if self.dtype == "float32" else 1,
            "evaluation.position_rule": "random",
            "evaluation.step_divisors": "[1]",
        }
        arguments = [f"{key}={value}" for key, value in given.items()]
        return load_config(["recipe=sudoku", f"objective.type={self.method}", *arguments, *self.settings])


ONE_STEP = ("objective.k=1", "objective.timestep_sampling=uniform")
"""Of AGRPO: a view of each completion."""


def _wide(**changes: Any) -> Shape:
    """Where the trunk takes the memory."""
    base = Shape(
        500, d_model=512, layers=6, heads=8, mlp=1536, prompt=64, completion=192, block=48, steps=32, rows=16,
        views_per_forward=8, top_k=50, top_p=0.95,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def _wordy(**changes: Any) -> Shape:
    """Where the vocabulary does."""
    base = Shape(
        126_464, d_model=64, layers=2, heads=2, mlp=128, prompt=32, completion=96, block=32, steps=12, rows=32,
        views_per_forward=32, lora_r=4,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def _scored(**changes: Any) -> Shape:
    """The same for methods that score many positions of a view."""
    sizes = {"vocabulary": 32_000, "layers": 1, "prompt": 16, "completion": 64, "steps": 8, "rows": 8, "top_k": 20}
    return _wordy(**{**sizes, "views_per_forward": 8, **changes})


def _agrpo(shape: Shape, dtype: str = "float32", *, checkpointing: bool = False) -> Case:
    """One forward, and its backward, of a view of each completion."""
    return Case(
        "learner", dataclasses.replace(shape, rows=shape.views_per_forward), dtype, checkpointing, settings=ONE_STEP
    )


def _methods(method: str, *settings: str, dtype: str = "float32", groups: int = 1, **changes: Any) -> Case:
    return Case("learner", _scored(**changes), dtype, groups=groups, method=method, settings=settings)


_STEP = {"prompt": 232, "completion": 24, "block": 24, "steps": 2, "layers": 2}
"""Two steps of two layers: every step and every layer of the engine need the same."""
_DRAW = {"completion": 24, "block": 24, "steps": 2, "layers": 1}
"""Many positions in a step, and a trunk of next to nothing."""
_ADAPTER = {"lora_r": 256, "prompt": 8, "completion": 24, "block": 24, "steps": 2}
"""An adapter that is larger than all else."""

CASES = {
    "one block's forward": Case("engine", _wide(rows=32, **_STEP)),
    "one block's forward, narrow MLP": Case("engine", _wide(rows=48, **_STEP | {"d_model": 768, "mlp": 768})),
    "one block's forward, long": Case(
        "engine", _wide(rows=12, **_STEP | {"d_model": 256, "mlp": 1024, "prompt": 1000})
    ),
    "one block's forward, bf16": Case("engine", _wide(rows=64, **_STEP), "bfloat16"),
    "top-k": Case("engine", _wordy(rows=10, **_DRAW)),
    "top-k, bf16": Case("engine", _wordy(rows=10, **_DRAW), "bfloat16"),
    "top-p": Case("engine", _wordy(rows=40, **_DRAW | {"vocabulary": 32_000, "top_k": None, "top_p": 0.95})),
    "no truncation": Case("engine", _wordy(rows=20, **_DRAW | {"vocabulary": 50_000, "top_k": None, "top_p": 1.0})),
    "chosen positions": Case("engine", _scored(rows=24, position_rule="decoupled_confidence")),
    "drawn branches": Case(
        "engine", _scored(vocabulary=126_464, rows=32, steps=32), method="dispo", settings=("objective.degree=0",)
    ),
    "greedy branches": Case("engine", _scored(rows=20), method="egspo", settings=("objective.k=4",)),
    "activations": _agrpo(_wide(views_per_forward=4)),
    "activations, many layers": _agrpo(_wide(views_per_forward=4, layers=12, d_model=256, heads=4, mlp=1024)),
    "activations, narrow MLP": _agrpo(_wide(views_per_forward=6, layers=4, d_model=768, mlp=768, lora_r=64)),
    "activations, bf16": _agrpo(_wide(views_per_forward=8), "bfloat16"),
    "checkpointing": _agrpo(_wide(views_per_forward=14), checkpointing=True),
    "checkpointing, many layers": _agrpo(
        _wide(views_per_forward=20, layers=16, d_model=256, heads=4, mlp=768), checkpointing=True
    ),
    "checkpointing, bf16": _agrpo(_wide(views_per_forward=20), "bfloat16", checkpointing=True),
    "restricted law": _agrpo(_wordy(views_per_forward=16, **_DRAW)),
    "restricted law, bf16": _agrpo(_wordy(views_per_forward=60, **_DRAW | {"vocabulary": 32_000}), "bfloat16"),
    "adapter": _agrpo(_wide(views_per_forward=2, **_ADAPTER)),
    "adapter, bf16": _agrpo(_wide(views_per_forward=2, **_ADAPTER), "bfloat16"),
    "scored choices": Case(
        "learner", _scored(rows=24, views_per_forward=24, position_rule="decoupled_confidence"), settings=ONE_STEP
    ),
    "left to right": Case(
        "learner",
        _wide(rows=4, views_per_forward=4, position_rule="left_to_right", **_STEP | {"steps": 24, "layers": 6}),
        method="just_grpo", settings=("objective.share=0.05",),
    ),
    "whole law": _methods("diffu_grpo"),
    "whole law, bf16": _methods("diffu_grpo", dtype="bfloat16"),
    "masks and complements": _methods("coupled_grpo", views_per_forward=12),
    "independent masks": _methods("bgpo", views_per_forward=16),
    "measured copies": _methods("dmpo", views_per_forward=16),
    "head of prompts": _methods("trafl", views_per_forward=16),
    "unit in several passes": _methods("trafl", "objective.normaliser=profiled", views_per_forward=16),
    "fills": _methods("dispo"),
    "laws and a teacher's": _methods("dtm", "objective.buffer_prompts=2", "objective.scored=all", groups=2),
    "laws and the base's": _methods("egspo", "objective.kl=exact", "objective.k=4", views_per_forward=32),
}  # fmt: skip
"""By the part of the plan that each is about. Each is of 200 MB or more: fixed costs are 10 to 20 MB."""
_TINY = {"prompt": 8, "completion": 24, "block": 24, "steps": 2, "rows": 4, "views_per_forward": 4, "lora_r": 4}
SMALL = {
    "engine": Case("engine", _wordy(**_TINY)),
    "learner": Case("learner", _wide(**_TINY | {"d_model": 64, "mlp": 128}), settings=ONE_STEP),
}
