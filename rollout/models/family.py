"""Model families. One PolicyAdapter says all that sampling and learning must know about a family; nothing else in the
code base asks which model it runs.

Importing this module registers the families with transformers, so ``AutoModel.from_pretrained`` reads their
checkpoints without remote code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from rewards.errors import ConfigError, first_line
from rollout.models import masked_lm
from rollout.models.dream import DreamConfig, DreamModel
from rollout.models.encoding import load_tokenizer
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM

AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoConfig.register("Dream", DreamConfig, exist_ok=True)
for _config, _model in ((LLaDAConfig, LLaDAModelLM), (LLaDAMoEConfig, LLaDAMoEModelLM), (DreamConfig, DreamModel)):
    AutoModel.register(_config, _model, exist_ok=True)


@dataclass(frozen=True)
class PolicyAdapter:
    """What differs between model families."""

    family: str
    model_class: type[PreTrainedModel]
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    logit_shift: int
    """0 when the logits at a position predict that position's own token, 1 when the next one's (Dream)."""
    lora_regex: str
    """Full match on module names, the linear maps inside the blocks; an exact pattern, because in LLaDA the LM head
    shares its last name part, ``ff_out``, with the MLP's output map."""
    head_name: str
    """Module name of the LM head."""
    max_length: int | None = None
    """Tokens that a sequence may have, prompt and completion together; None when config.json doesn't say."""
    block_regex: str | None = None
    """Full match on every linear map inside the blocks, which are those that may be stored in few bits; None when LoRA
    adapts them all."""


def policy_adapter(model_path: str | Path) -> PolicyAdapter:
    """The adapter of the checkpoint in this folder (or of this hub name), from its config.json.

    Raises ConfigError when there is no readable config.json or its model type is not a known family.
    """
    raw = read_config(model_path)
    model_type = raw.get("model_type")
    if model_type in masked_lm.ARCHITECTURES:
        return _masked_lm(model_path, raw)
    if model_type not in _FAMILIES:
        known = ", ".join(sorted({*_FAMILIES, *masked_lm.ARCHITECTURES}))
        raise ConfigError(f"{model_path} holds a model of type {model_type!r}; the known families are: {known}")
    try:
        adapter = _FAMILIES[model_type](raw)
    except StrictDataclassError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{model_path}: its config.json has a value of another type: {why}") from error
    rows = raw.get("embedding_size") or raw.get("vocab_size")
    if rows is not None and adapter.mask_token_id >= rows:
        raise ConfigError(
            f"{model_path}: its mask token {adapter.mask_token_id} lies beyond its vocabulary of {rows}; "
            "set mask_token_id in its config.json"
        )
    return adapter


def read_config(model_path: str | Path) -> dict[str, Any]:
    """The checkpoint's config.json as it is. Raises ConfigError when there is none that can be read."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(str(model_path))
    except (OSError, ValueError) as error:
        why = first_line(error)
        raise ConfigError(f"no model at {model_path}: its config.json can't be read ({why})") from error
    if not raw:
        raise ConfigError(f"no model at {model_path}: there is no config.json, or nothing in it")
    return raw


def _llada(raw: dict[str, Any]) -> PolicyAdapter:
    config = LLaDAConfig.from_dict(raw)
    if isinstance(config, LLaDAMoEConfig):
        return _llada_moe(config)
    return PolicyAdapter(
        family="llada",
        model_class=LLaDAModelLM,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        logit_shift=0,
        lora_regex=r"model\.transformer\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
        head_name="model.transformer.ff_out",
        max_length=config.max_sequence_length,
    )


def _llada_moe(config: LLaDAMoEConfig) -> PolicyAdapter:
    attention = r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
    return PolicyAdapter(
        family="llada_moe",
        model_class=LLaDAMoEModelLM,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        logit_shift=0,
        # The attention only: at r = 64 the 3,072 maps of the experts would take 604 M parameters of adapter.
        lora_regex=attention,
        head_name="lm_head",
        max_length=config.max_position_embeddings,
        block_regex=attention + r"|model\.layers\.\d+\.mlp\.(experts\.\d+\.)?(gate|up|down)_proj",
    )


def _dream(raw: dict[str, Any]) -> PolicyAdapter:
    config = DreamConfig.from_dict(raw)
    return PolicyAdapter(
        family="dream",
        model_class=DreamModel,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        logit_shift=1,
        lora_regex=r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
        head_name="lm_head",
        max_length=config.max_position_embeddings,
    )


def _masked_lm(model_path: str | Path, raw: dict[str, Any]) -> PolicyAdapter:
    model_type = raw["model_type"]
    architecture = masked_lm.ARCHITECTURES[model_type]
    if raw.get("is_decoder"):
        raise ConfigError(f"{model_path} has is_decoder=true in its config.json and sees the past only; set it false")
    if model_type == "esm" and raw.get("position_embedding_type") != "rotary":
        raise ConfigError(f"{model_path} is an ESM-1, whose positions are not rotary; of this family take ESM-2")
    if raw.get("inner_group_num", 1) != 1:
        raise ConfigError(
            f"{model_path} has inner_group_num={raw['inner_group_num']} in its config.json, several layers for one; "
            "an ALBERT is read with inner_group_num=1, as all that are published have"
        )
    mask, eos, pad = masked_lm.special_tokens(str(model_path), load_tokenizer(model_path), raw.get("vocab_size"))
    return PolicyAdapter(
        family=model_type,
        model_class=masked_lm.model_class(model_type),
        mask_token_id=mask,
        eos_token_id=eos,
        pad_token_id=pad,
        logit_shift=0,
        lora_regex=architecture.lora_regex,
        head_name=architecture.head_name,
        max_length=masked_lm.longest_sequence(model_type, raw),
    )


_FAMILIES = {"llada": _llada, "Dream": _dream}
