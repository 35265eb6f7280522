"""What a run starts from: its directory, its checkpoint, its problems, its adapter."""

import contextlib
from pathlib import Path
from typing import Literal

import torch

from learner.runs import checkpoint as checkpoints
from learner.runs.aside import put_back
from learner.runs.directory import RunDirectory
from learner.runs.session import joins
from learner.settings.arguments import flat
from learner.settings.saved import OF_A_START, checkpoints_in, kind_of, run_to_resume, saved_settings
from learner.settings.sections import (
    GroupSection,
    LoraSection,
    ModelSection,
    ResourcesSection,
    RolloutSection,
    RunPlace,
)
from rewards.errors import CheckpointError, ConfigError
from rewards.section import Section
from rollout.adapters import AdapterState, pack, read_peft_folder, require_plain_lora, unpack, without_head
from rollout.engines.vllm.settings import MERGED, require_support, require_vllm, slot_rank
from rollout.models.family import policy_adapter
from rollout.models.lora import LoraSpec, adapter_shapes
from rollout.models.quantization import require_bitsandbytes


def open_run(
    run: RunPlace, *, kind: Literal["run", "sft"], label: str
) -> tuple[RunDirectory, checkpoints.Checkpoint | None]:
    """The run's directory, locked, and the checkpoint that it goes on from (None for one that begins, or that ended
    before its first checkpoint and begins again). See ``learner.settings.saved`` for the run that ``run.resume`` means;
    its newest good checkpoint is taken unless another one is named. Nothing that the run has written is changed, but
    that a resume which ended before its first checkpoint is undone.

    Args:
        label: goes into the name of a run that is given none.

    Raises:
        CheckpointError: when the checkpoint named is damaged, or none of a run's checkpoints is good.
        ConfigError: when the directory is taken, or its run is of the other kind.
    """
    existing = run_to_resume(run, kind)
    if existing is None:
        return RunDirectory.create(Path(run.dir).expanduser(), run.name, label=label, shared=run.shared), None
    if kind_of(existing) not in (None, kind):
        right = "main" if kind == "sft" else "sft"
        raise ConfigError(f"{existing} is a run of python -m learner.{right} and can only be resumed with that")
    with contextlib.ExitStack() as failed:
        run_dir = failed.enter_context(RunDirectory.open(existing))
        run_dir.undone = put_back(run_dir)
        if run_dir.undone is not None:
            told = f"the resume after iteration {run_dir.undone} ended before its first checkpoint and is undone"
            print(told, flush=True)
        named = Path(run.resume).expanduser().absolute()
        found = _newest(run_dir) if run.resume == "auto" or named == existing else _load_named(run_dir, named)
        failed.pop_all()
    return run_dir, found


def finished(run_dir: RunDirectory, resumed: checkpoints.Checkpoint | None, iterations: int) -> bool:
    """Whether nothing is left to do of so many iterations, which is then printed, with how to go on."""
    if resumed is None or resumed.progress.iteration < iterations or not run_dir.summary_path.is_file():
        return False
    progress = resumed.progress
    if progress.evaluations and progress.evaluated_at < progress.iteration:  # it was stopped in its last evaluation
        return False
    print(
        f"run {run_dir.id} has done {progress.iteration} iterations, all of the {iterations} that it was to do: its "
        f"results are in {run_dir.path}"
    )
    return True


def changed_settings(run_dir: RunDirectory, config: Section) -> list[str]:
    """Settings that differ from those that the run had so far, as ``key: old -> new``."""
    old, new = flat(saved_settings(run_dir.path)), flat(config.model_dump(mode="json"))
    passing = {f"run.{key}" for key in OF_A_START}
    keys = sorted(key for key in {*old, *new} if old.get(key) != new.get(key) and key not in passing)
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def check_quantization(model: ModelSection, learner: GroupSection, resources: ResourcesSection) -> None:
    """Refuses a quantized base where bitsandbytes is missing, or can't do it on a device of the run. Raises
    ConfigError."""
    if model.quantization is None:
        return
    gpus = learner.device == "cuda" or resources.gpus_per_rank > 0 or resources.gpus_per_actor > 0
    require_bitsandbytes(model.quantization, "cuda" if gpus else "cpu")


def check_engine(
    rollout: RolloutSection,
    model: ModelSection,
    resources: ResourcesSection,
    *,
    model_path: str | None,
    r: int | None,
    adapts_head: bool,
) -> None:
    """Refuses ``rollout.engine=vllm`` where vLLM isn't, or can't do what the settings say. Raises ConfigError.

    Args:
        model_path: None for the small base, a LLaDA.
        r: rank of the adapter; None for the bare base.
        adapts_head: whether the LM head is part of it.
    """
    if rollout.engine != "vllm":
        return
    if not joins(resources.ray_address):
        require_vllm()  # elsewhere, each actor says whether its node has it
    family = "llada" if model_path is None else policy_adapter(model_path).family
    require_support(family, rollout.vllm, adapts_head=adapts_head)
    if r is not None and family not in MERGED:
        slot_rank(r)
    if model.quantization is not None:
        raise ConfigError(
            f"model.quantization={model.quantization} is bitsandbytes', which rollout.engine=vllm doesn't load; set it "
            "null, or rollout.engine=torch"
        )
    processes = rollout.vllm.tensor_parallel_size
    if 0 < resources.gpus_per_actor < processes:
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size={processes} needs as many GPUs, and an actor has "
            f"resources.gpus_per_actor={resources.gpus_per_actor:g}; raise that"
        )


def starting_adapter(lora: LoraSection, dtype: str) -> AdapterState | None:
    """The adapter that ``lora.adapter`` names, in ``learner.dtype``, without the head that it was trained with; None
    for a fresh one.

    Raises:
        ConfigError: when it has another shape than the settings say, or is no plain LoRA.
        DataError: when the folder holds no readable adapter.
    """
    if lora.adapter is None:
        return None
    folder = Path(lora.adapter).expanduser()
    state, stored = read_peft_folder(folder)
    require_plain_lora(stored, folder)
    if (stored.get("r"), float(stored.get("lora_alpha", 0))) != (lora.r, lora.alpha):
        have = f"r={stored.get('r')}, alpha={stored.get('lora_alpha')}"
        now = f"lora.r={lora.r}, lora.alpha={lora.alpha}"
        raise ConfigError(f"the adapter at {lora.adapter} has {have} and the settings say {now}; make them equal")
    return pack({name: unpack(packed).to(getattr(torch, dtype)) for name, packed in without_head(state).items()})


def require_adapter_fits(lora: LoraSection, state: AdapterState, model_path: str, spec: LoraSpec) -> None:
    """Refuses an adapter for other maps than those that this run adapts, before a rank finds out. Raises ConfigError.

    spec: the shape that the settings ask for.
    """
    wanted = adapter_shapes(model_path, spec)
    have = {name: packed.shape for name, packed in state.items()}
    for odd, what in ((set(wanted) - set(have), "lacks"), (set(have) - set(wanted), "has")):
        if odd:
            raise ConfigError(
                f"the adapter at {lora.adapter} {what} {min(odd)}, unlike this run's; set lora.target_modules and "
                "lora.include_head as they were when it was trained"
            )
    for name, shape in wanted.items():
        if have[name] != shape:
            raise ConfigError(
                f"the adapter at {lora.adapter} has {name} as {list(have[name])} and this model needs {list(shape)}; "
                "give the model that it was trained on as model.path"
            )


def _load_named(run_dir: RunDirectory, path: Path) -> checkpoints.Checkpoint:
    if not path.is_dir():
        there = ", ".join(found.name for found in checkpoints_in(run_dir.checkpoints_dir)) or "none"
        raise ConfigError(f"run.resume={path}: there is no such checkpoint; there are {there}")
    return checkpoints.load(path)


def _newest(run_dir: RunDirectory) -> checkpoints.Checkpoint | None:
    if not checkpoints_in(run_dir.checkpoints_dir):
        print(f"{run_dir.path} has no checkpoint yet; the run begins again, from the start", flush=True)
        return None
    damaged: list[CheckpointError] = []
    found = checkpoints.newest_good(run_dir.checkpoints_dir, on_damaged=damaged.append)
    for error in damaged:
        print(f"warning: {error}; taking the checkpoint before it", flush=True)
    if found is None:
        raise CheckpointError(
            f"{run_dir.path} has no good checkpoint to resume from; start a new run with run.resume=never"
        )
    return found
