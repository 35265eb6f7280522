"""LoRA on exactly named modules."""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from rewards.errors import ConfigError
from rollout.adapters import ADAPTER_NAME, AdapterState, adapter_parameters, require_plain_lora, without_head
from rollout.models.adapted import with_adapter_added_up
from rollout.models.family import PolicyAdapter, policy_adapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraSpec:
    """Shape of the adapter. ``init_seed`` names the initial values of the A matrices; the B matrices start at 0.

    target_modules: what to adapt in place of the family's own choice: names of linear maps, in full or their last parts
    (``q_proj``, ``mlp.down_proj``); None for the family's choice.
    """

    r: int
    alpha: float
    include_head: bool = False
    init_seed: int = 0
    target_modules: tuple[str, ...] | None = None


def attach_lora(model: torch.nn.Module, family: PolicyAdapter, spec: LoraSpec) -> PeftModel:
    """Wrap ``model`` with a fresh LoRA adapter in the model's own dtype; only the adapter requires gradients.

    Raises:
        ConfigError: when a name matches no linear map of this model, naming the linear maps that it has.
    """
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=0.0,
        bias="none",
        target_modules=target_pattern(model, family, spec),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.init_seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    dtype = _embedding(model).weight.dtype
    for parameter in adapter_parameters(adapted).values():
        parameter.data = parameter.data.to(dtype)  # PEFT takes the dtype of the map, which a quantized one has not
    with_adapter_added_up(adapted)
    return adapted


def spec_of_adapter(
    state: AdapterState, peft_config: Mapping[str, Any], family: PolicyAdapter, source: Path
) -> LoraSpec:
    """The shape of an adapter as read from ``source``, in PEFT format.

    Raises:
        ConfigError: when it needs what this LoRA has not.
    """
    require_plain_lora(peft_config, source)
    modules = sorted({name.rpartition(".lora_")[0] for name in without_head(state)})
    # The family's own choice is written as its pattern, alone or followed by the head's; everything else by name.
    targets = peft_config.get("target_modules")
    own = targets is None or family.lora_regex in str(targets)
    return LoraSpec(
        peft_config["r"],
        float(peft_config["lora_alpha"]),
        include_head=family.head_name in modules,
        target_modules=None if own else tuple(modules),
    )


def adapter_shapes(model_path: str, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter's parameters by canonical name, sorted; no weight is loaded.

    Raises:
        ConfigError: when there is no readable config.json, or a name matches no linear map of this model.
    """
    family = policy_adapter(model_path)
    model_class: Any = family.model_class
    with torch.device("meta"):
        model = model_class._from_config(AutoConfig.from_pretrained(model_path))
    parameters = adapter_parameters(attach_lora(model, family, spec))
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


def target_pattern(model: torch.nn.Module, family: PolicyAdapter, spec: LoraSpec) -> str:
    """Full-match pattern on the names of the modules to adapt.

    Without ``target_modules`` it is the family's own, by exact names: a last part like ``ff_out`` would hit LLaDA's LM
    head too. With them a last part hits every linear map that ends so, except the head, which is adapted when
    ``include_head`` is set or its full name is given; a warning says when a last part would have hit it.

    Raises ConfigError when a name matches nothing.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if spec.target_modules is None:
        pattern = family.lora_regex
        if not any(re.fullmatch(pattern, name) for name in linear):
            raise ConfigError(f"no linear map of this model has one of the names {pattern!r}; {_listing(linear)}")
    else:
        pattern = _pattern(_named(spec.target_modules, linear, family.head_name, spec.include_head), linear)
    if spec.include_head:
        # Merging an adapter of the head would change a tied embedding with it.
        tied = family.head_name in linear and (model.get_submodule(family.head_name).weight is _embedding(model).weight)
        if family.head_name not in linear or tied:
            raise ConfigError(
                f"lora.include_head: this model has no LM head {family.head_name!r} of its own (its weights are those "
                f"of the embedding); {_listing(linear)}"
            )
        if not re.fullmatch(pattern, family.head_name):
            pattern = f"(?:{pattern})|{_exactly(family.head_name)}"
    return pattern


def _named(targets: Iterable[str], linear: list[str], head: str, include_head: bool) -> set[str]:
    found: set[str] = set()
    for target in targets:
        hits = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not hits:
            raise ConfigError(f"lora.target_modules: {target!r} names no linear map of this model; {_listing(linear)}")
        if head in hits and target != head and not include_head:
            logger.warning(
                "lora.target_modules: %r names the LM head %s too, which stays as it is; give that name in full, or "
                "set lora.include_head, to adapt it",
                target,
                head,
            )
            hits.discard(head)
        found |= hits
    return found


def _pattern(names: set[str], linear: list[str]) -> str:
    """Matches these of the linear maps and no others: one pattern for a map of all layers, where all are meant."""
    shapes = sorted({re.sub(r"\.\d+\.", r".#.", name) for name in names})
    pattern = "|".join(_exactly(shape).replace("#", r"\d+") for shape in shapes)
    if {name for name in linear if re.fullmatch(pattern, name)} == names:
        return pattern
    return "|".join(map(_exactly, sorted(names)))


def _embedding(model: torch.nn.Module) -> torch.nn.Embedding:
    return cast(torch.nn.Embedding, cast(PreTrainedModel, model).get_input_embeddings())


def _exactly(name: str) -> str:
    return name.replace(".", "[.]")


def _listing(linear: list[str]) -> str:
    shapes = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in linear})
    return f"its linear maps are {', '.join(shapes)}"
