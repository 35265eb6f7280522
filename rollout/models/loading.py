"""A checkpoint's weights, whole or quantized, as the model of its family."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from rewards.errors import ConfigError, first_line
from rollout.models import masked_lm
from rollout.models.family import PolicyAdapter, policy_adapter
from rollout.models.few_bits import Quantization
from rollout.models.quantization import exact_products, quantization_config, require_bitsandbytes

disable_progress_bar()  # a bar per load and process would tear the run's own output apart


def load_model(
    model_path: str | Path,
    dtype: str = "float32",
    *,
    quantization: Quantization | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The checkpoint's weights in this dtype ("float32", "bfloat16", ...), on this device, in eval mode.

    The file is mapped, and each tensor goes from there to device and dtype: on a GPU no copy of the weights is ever in
    the host's memory, and on a CPU there is none where the file has the dtype.

    quantization: store the blocks' linear maps in 4 or 8 bits; everything else has the dtype.

    Raises ConfigError when the checkpoint's weights are not exactly the model's, by name and by shape, when they can't
    be read, or not be quantized here. A masked LM's checkpoint may hold more: heads of its pretraining.
    """
    # Partial sums of a bfloat16 product on a GPU are kept in fp32, which costs next to nothing.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    family = policy_adapter(model_path)
    model_class: Any = family.model_class
    device = torch.device(device)
    options: dict[str, Any] = {"dtype": dtype}
    if device.type == "cuda" or quantization is not None:
        options["device_map"] = {"": device}  # quantized where it is used, too: no second copy, no other rounding
    if quantization is not None:
        require_bitsandbytes(quantization, device.type)
        options["quantization_config"] = quantization_config(
            quantization, dtype, family.block_regex or family.lora_regex
        )
    try:
        model, loading = model_class.from_pretrained(
            str(model_path),
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and then refused here
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the weights at {model_path} can't be read: {first_line(error)}") from error
    _check_complete(family, model_path, loading)
    if quantization is None:
        return model.to(device).eval()
    exact_products(model)
    return model.eval()


def recompute_activations(model: Any) -> None:
    """In the backward, instead of keeping them. Nothing in the models is random, so no generator's state is kept."""
    how = {"use_reentrant": False, "preserve_rng_state": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def _check_complete(family: PolicyAdapter, model_path: str | Path, loading: dict[str, Any]) -> None:
    problems = {
        "lacks": loading["missing_keys"],
        "has too much": set() if family.family in masked_lm.ARCHITECTURES else loading["unexpected_keys"],
        "has in other shapes": {f"{name} {tuple(found)}" for name, found, _ in loading["mismatched_keys"]},
    }
    said = [
        f"{what}: {', '.join(sorted(names)[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in problems.items()
        if names
    ]
    if said:
        where = f"the checkpoint at {model_path} doesn't hold the weights of a {family.family} model"
        raise ConfigError(f"{where} of the sizes in its config.json; it {'; it '.join(said)}")
