"""LoRA on exactly named modules."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rewards.errors import ConfigError
from rollout.adapters import ADAPTER_NAME
from rollout.models import PolicyAdapter


@dataclass(frozen=True)
class LoraSpec:
    """Shape of the adapter. ``init_seed`` names the initial values of the A matrices; the B matrices start at 0."""

    r: int
    alpha: float
    include_head: bool = False
    init_seed: int = 0


def attach_lora(model: torch.nn.Module, family: PolicyAdapter, spec: LoraSpec) -> PeftModel:
    """Wrap ``model`` with a fresh LoRA adapter in the model's own dtype; only the adapter requires gradients.

    Modules are matched by full name: a suffix like ``ff_out`` would also hit LLaDA's LM head.

    Raises:
        ConfigError: when the family's module names match nothing in this model, naming the linear maps that it has.
    """
    pattern = family.lora_regex
    if spec.include_head:
        pattern = f"(?:{pattern})|{family.head_name.replace('.', '[.]')}"
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=0.0,
        bias="none",
        target_modules=pattern,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.init_seed)
            return get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        message = f"no module of this model matches the LoRA target pattern {pattern!r}; its linear maps are {linear}"
        raise ConfigError(message) from error
