"""Model families. One PolicyAdapter says all that sampling and learning must know about a family; nothing else in the
code base asks which model it runs.

Importing this package registers the families with transformers, so ``AutoModel.from_pretrained`` reads their
checkpoints without remote code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from rewards.errors import ConfigError
from rollout.models.llada import LLaDAConfig, LLaDAModelLM

AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
disable_progress_bar()  # a bar per load and process would tear the run's own output apart


@dataclass(frozen=True)
class PolicyAdapter:
    """What differs between model families.

    logit_shift: 0 when the logits at a position predict that position's own token, 1 when the next one's (Dream).
    attention: the kind of attention the model was trained with. lora_regex: full match on module names, the linear
    maps inside the blocks; an exact pattern, because in LLaDA the LM head shares its last name part, ``ff_out``, with
    the MLP's output map. head_name: module name of the LM head.
    """

    family: str
    model_class: type[PreTrainedModel]
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int
    logit_shift: int
    attention: str
    lora_regex: str
    head_name: str


def policy_adapter(model_path: str | Path) -> PolicyAdapter:
    """The adapter of the checkpoint in this folder (or of this hub name), from its config.json.

    Raises ConfigError when there is no readable config.json or its model type is not a known family.
    """
    try:
        raw, _ = LLaDAConfig.get_config_dict(str(model_path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no model at {model_path}: its config.json can't be read ({error})") from error
    model_type = raw.get("model_type")
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ConfigError(f"{model_path} holds a model of type {model_type!r}; the known families are: {known}")
    return _FAMILIES[model_type](raw)


def load_model(model_path: str | Path, dtype: str = "float32") -> PreTrainedModel:
    """The checkpoint's weights in this dtype ("float32", "bfloat16", ...), on the CPU, in eval mode."""
    return policy_adapter(model_path).model_class.from_pretrained(str(model_path), dtype=dtype).eval()


def load_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the checkpoint. Raises ConfigError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(model_path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {model_path}: {error}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation and the header of the assistant's turn, where the completion starts."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    # The template writes the start token itself.
    return tokenizer.encode(text, add_special_tokens=False)


def _llada(raw: dict[str, Any]) -> PolicyAdapter:
    config = LLaDAConfig.from_dict(raw)
    return PolicyAdapter(
        family="llada",
        model_class=LLaDAModelLM,
        mask_token_id=config.mask_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        logit_shift=0,
        attention="bidirectional",
        lora_regex=r"model\.transformer\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
        head_name="model.transformer.ff_out",
    )


_FAMILIES = {"llada": _llada}
