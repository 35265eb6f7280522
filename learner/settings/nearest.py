"""The setting that a person meant, by its last part, what other trainers call it, its description or its letters."""

import difflib
import re
from collections.abc import Sequence

from pydantic.fields import FieldInfo

_ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("batch_size", "train_batch_size", "per_device_train_batch_size"), "prompts_per_iteration batch"),
    **dict.fromkeys(("num_generations", "n", "g", "num_samples", "samples_per_prompt"), "group_size"),
    **dict.fromkeys(("max_steps", "num_steps", "total_steps", "num_train_epochs", "epochs"), "epochs iterations"),
    **dict.fromkeys(("model", "model_name", "model_name_or_path", "base_model"), "model.path"),
    **dict.fromkeys(("output_dir", "save_dir", "output", "out"), "run.dir"),
    **dict.fromkeys(("run_name", "exp_name", "experiment_name"), "run.name"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from", "load_checkpoint"), "run.resume"),
    **dict.fromkeys(("save_steps", "save_every", "save_freq", "save_interval"), "checkpoint.every"),
    "save_total_limit": "checkpoint.keep",
    **dict.fromkeys(("eval_steps", "eval_every", "eval_freq", "test_freq"), "evaluate_every evaluation.every"),
    **dict.fromkeys(("kl", "kl_coef", "kl_loss_coef", "kl_coeff"), "objective.beta"),
    **dict.fromkeys(("epsilon", "clip", "clip_range", "clip_ratio", "epsilon_low"), "objective.clip_low"),
    "epsilon_high": "objective.clip_high",
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), "lora.r"),
    "lora_alpha": "lora.alpha",
    **dict.fromkeys(
        ("max_completion_length", "max_new_tokens", "max_tokens", "gen_length", "max_response_length"),
        "completion_length",
    ),
    **dict.fromkeys(("diffusion_steps", "denoising_steps", "num_diffusion_steps"), "rollout.sampler.steps"),
    **dict.fromkeys(("data", "dataset", "dataset_name", "train_file", "train_files"), "data.train train_path"),
    **dict.fromkeys(("test_file", "test_files", "val_files", "eval_dataset"), "data.held_out test_path"),
    **dict.fromkeys(("reward", "reward_fn", "reward_funcs", "reward_function"), "task.name"),
    **dict.fromkeys(("bf16", "fp16", "precision", "torch_dtype"), "learner.dtype"),
    **dict.fromkeys(("grad_clip", "gradient_clipping", "clip_grad", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("num_gpus", "n_gpus", "gpus", "world_size", "nproc_per_node"), "learner.ranks"),
    **dict.fromkeys(("gradient_accumulation_steps", "micro_batch_size"), "views_per_forward rows_per_forward"),
    "gradient_checkpointing": "activation_checkpointing",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantize"), "model.quantization"),
    **dict.fromkeys(("report_to", "logger", "loggers", "wandb", "tensorboard"), "trackers"),
    **dict.fromkeys(("num_iterations", "ppo_epochs", "mu"), "updates_per_batch"),
    **dict.fromkeys(("warmup", "warmup_ratio", "warmup_steps"), "warmup_fraction"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "lr_schedule"),
    **dict.fromkeys(("num_workers", "workers"), "rollout.actors"),
}
"""What TRL, verl, d1 and their like call a setting, and ours: the ends of its key, the first that there is."""


def nearest_key(key: str, fields: Sequence[tuple[str, FieldInfo]]) -> str | None:
    """Of these settings and their sections; None when none is near."""
    known = list(dict.fromkeys(name for name, _ in fields))
    known += sorted({name[: dot.start()] for name in known for dot in re.finditer(r"\.", name)})
    last = key.rpartition(".")[2]
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return same[0]
    word = last.lower().replace("-", "_")
    for end in _ELSEWHERE.get(word, "").split():
        if found := [name for name in known if f".{name}".endswith(f".{end}")]:
            return found[0]
    phrase = re.compile(rf"\b{re.escape(word.replace('_', ' '))}s?\b", re.IGNORECASE)
    described = [name for name, field in fields if phrase.search(field.description or "")]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    close += difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.75)
    if close:
        return next(name for name in known if close[0] in (name, name.rpartition(".")[2]))
    if described:
        return min(described, key=lambda name: len(dict(fields)[name].description or ""))
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=0.6)), None)
