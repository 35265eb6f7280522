"""DeepSpeed around the policy: its configuration, an optimizer that refuses non-finite gradients, and the optimizer's
state as plain tensors (DeepSpeed's own checkpoints are pickles; see docs/how-a-run-flows.md).
"""

import math
from typing import Any

import torch
from safetensors.torch import load as load_safetensors

from rewards.errors import CheckpointError


class FiniteAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing when a gradient is not finite, or when it was told so before.

    ZeRO 1 to 3 check for that themselves, on all ranks together; at stage 0 gradients are all-reduced before the step,
    so that every rank sees the same ones and decides alike.
    """

    _refused = False

    def refuse_step(self) -> None:
        """Do nothing in the next step."""
        self._refused = True

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        refused, self._refused = self._refused, False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not refused and all(bool(grad.isfinite().all()) for grad in grads):
            super().step(closure)


def deepspeed_config(*, zero_stage: int, dtype: str, max_grad_norm: float, trained: int) -> dict[str, Any]:
    """DeepSpeed's settings. Batch sizes are 1: accumulation is ours, the boundary is set before each backward.

    trained: number of trained parameters. DeepSpeed allocates its gradient bucket whole, 5e8 numbers unless told
    otherwise; an adapter fits into a smaller one, and is reduced at once as it would be there.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": trained},
        "steps_per_print": 10**9,
    }
    if dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        # Gradients add up in fp32 over forwards, and over ranks.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def learning_rate(update: int, total: int, *, peak: float, schedule: str, warmup_fraction: float) -> float:
    """Rate of update number ``update`` (from 0) of ``total``: linear warm-up, then constant, cosine or linear to 0."""
    warmup = math.ceil(warmup_fraction * total)
    if update < warmup:
        return peak * (update + 1) / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def masters(engine: Any) -> list[torch.Tensor]:
    """The tensors that this rank's inner AdamW updates: parameters at stage 0, flat fp32 partitions from stage 1 on."""
    optimizer = engine.optimizer
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, attribute):
            return list(getattr(optimizer, attribute))
    return [p for group in optimizer.param_groups for p in group["params"]]


def inner_optimizer(engine: Any) -> FiniteAdamW:
    """The AdamW inside DeepSpeed's wrappers."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def updates_applied(engine: Any) -> int:
    """Optimizer updates that really happened, counted by AdamW itself."""
    state = inner_optimizer(engine).state
    steps = {int(state[p]["step"]) for p in masters(engine) if "step" in state.get(p, {})}
    assert len(steps) <= 1, f"parameters took different numbers of optimizer steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def export_state(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's optimizer state: ``master.i`` (fp32 weights or partition) and AdamW's three tensors for each."""
    tensors = {}
    state = inner_optimizer(engine).state
    for i, master in enumerate(masters(engine)):
        tensors[f"master.{i}"] = master.detach().to("cpu", copy=True).contiguous()
        for key, value in state.get(master, {}).items():
            tensors[f"{key}.{i}"] = value.detach().to("cpu", copy=True).contiguous()
    return tensors


def import_state(engine: Any, shard: bytes) -> None:
    """Take over what ``export_state`` gave, as safetensors bytes, on a rank of the same layout.

    Raises:
        CheckpointError: when the tensors don't fit this rank's.
    """
    tensors = load_safetensors(shard)
    state = inner_optimizer(engine).state
    own = masters(engine)
    names = {name for name in tensors if name.startswith("master.")}
    if names != {f"master.{i}" for i in range(len(own))}:
        raise CheckpointError(f"the optimizer shard holds {len(names)} tensors and this rank needs {len(own)}")
    with torch.no_grad():
        for i, master in enumerate(own):
            if tensors[f"master.{i}"].shape != master.shape:
                shapes = f"{tuple(tensors[f'master.{i}'].shape)} against {tuple(master.shape)}"
                raise CheckpointError(f"optimizer tensor {i} of the checkpoint doesn't fit this run's layout: {shapes}")
            master.copy_(tensors[f"master.{i}"])
            moments = {
                key: tensors[f"{key}.{i}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{i}" in tensors
            }
            if moments:
                step = moments.pop("step")
                state[master] = {"step": step, **{k: v.to(master.device) for k, v in moments.items()}}
