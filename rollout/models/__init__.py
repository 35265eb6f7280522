"""Model families. One PolicyAdapter says all that sampling and learning must know about a family; nothing else in the
code base asks which model it runs.

Importing this package registers the families with transformers, so ``AutoModel.from_pretrained`` reads their
checkpoints without remote code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.logging import disable_progress_bar

from rewards.errors import ConfigError
from rollout.models import masked_lm
from rollout.models.chat import render_chat
from rollout.models.dream import DreamConfig, DreamModel
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.llada_moe import LLaDAMoEConfig, LLaDAMoEModelLM
from rollout.models.quantization import Quantization, exact_products, quantization_config, require_bitsandbytes

AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoConfig.register("Dream", DreamConfig, exist_ok=True)
for _config, _model in ((LLaDAConfig, LLaDAModelLM), (LLaDAMoEConfig, LLaDAMoEModelLM), (DreamConfig, DreamModel)):
    AutoModel.register(_config, _model, exist_ok=True)
disable_progress_bar()  # a bar per load and process would tear the run's own output apart


@dataclass(frozen=True)
class PolicyAdapter:
    """What differs between model families.

    logit_shift: 0 when the logits at a position predict that position's own token, 1 when the next one's (Dream).
    attention: the kind of attention the model was trained with. lora_regex: full match on module names, the linear
    maps inside the blocks; an exact pattern, because in LLaDA the LM head shares its last name part, ``ff_out``, with
    the MLP's output map. head_name: module name of the LM head. max_length: tokens that a sequence may have, prompt and
    completion together; None when config.json doesn't say. block_regex: full match on every linear map inside the
    blocks, which are those that may be stored in few bits; None when LoRA adapts them all.
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
    max_length: int | None = None
    block_regex: str | None = None


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
        why = _first_line(error)
        raise ConfigError(f"no model at {model_path}: its config.json can't be read ({why})") from error
    if not raw:
        raise ConfigError(f"no model at {model_path}: there is no config.json, or nothing in it")
    return raw


def load_model(
    model_path: str | Path,
    dtype: str = "float32",
    *,
    quantization: Quantization | None = None,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The checkpoint's weights in this dtype ("float32", "bfloat16", ...), on this device, in eval mode.

    quantization: store the blocks' linear maps in 4 or 8 bits; everything else has the dtype.

    Raises ConfigError when the checkpoint's weights are not exactly the model's, by name and by shape, when they can't
    be read, or not be quantized here. A masked LM's checkpoint may hold more: heads of its pretraining.
    """
    family = policy_adapter(model_path)
    model_class: Any = family.model_class
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        require_bitsandbytes(quantization, torch.device(device).type)
        options["quantization_config"] = quantization_config(
            quantization, dtype, family.block_regex or family.lora_regex
        )
        options["device_map"] = {"": device}  # quantized where it is used: no second copy, no other rounding
    try:
        model, loading = model_class.from_pretrained(
            str(model_path),
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and then refused here
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the weights at {model_path} can't be read: {_first_line(error)}") from error
    _check_complete(family, model_path, loading)
    if quantization is None:
        return model.to(device).eval()
    exact_products(model)
    return model.eval()


def load_tokenizer(model_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the checkpoint. Raises ConfigError when there is none, or only one of foreign code."""
    try:
        named = get_tokenizer_config(str(model_path)).get("tokenizer_class")
        reader: Any = _TOKENIZERS.get(str(named), AutoTokenizer)
        return reader.from_pretrained(str(model_path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer at {model_path}: {_first_line(error)}") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation and what stands before the completion: the header of the assistant's turn.

    A tokenizer without a chat template (a masked LM's) gets the messages' texts, an empty line between them, as the
    first half of a pair of texts whose second half is the completion: ``[CLS] text [SEP]`` for BERT and ModernBERT,
    ``<s>text</s></s>`` for RoBERTa. Roles are not written.

    A last message of the assistant is the beginning of the completion, and ends the prompt as it stands.

    Raises ConfigError when the chat template fails on these messages (``rollout.models.chat``).
    """
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    asked = list(messages[:-1] if begun else messages)
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"].strip() for message in asked)
        pair = tokenizer(text, ".", split_special_tokens=True)  # any second text: it only shows where one starts
        return pair["input_ids"][: pair.sequence_ids().index(1)] + tokenizer.encode(begun, add_special_tokens=False)
    rendered = render_chat(tokenizer, asked, add_generation_prompt=True)
    # The template writes the start token itself.
    return tokenizer.encode(rendered + begun, add_special_tokens=False)


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
        attention="bidirectional",
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
        attention="bidirectional",
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
        attention="bidirectional",
        lora_regex=r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
        head_name="lm_head",
        max_length=config.max_position_embeddings,
    )


def _masked_lm(model_path: str | Path, raw: dict[str, Any]) -> PolicyAdapter:
    model_type = raw["model_type"]
    architecture = masked_lm.ARCHITECTURES[model_type]
    if raw.get("is_decoder"):
        raise ConfigError(f"{model_path} has is_decoder=true in its config.json and sees the past only; set it false")
    mask, eos, pad = masked_lm.special_tokens(str(model_path), load_tokenizer(model_path), raw.get("vocab_size"))
    return PolicyAdapter(
        family=model_type,
        model_class=masked_lm.model_class(model_type),
        mask_token_id=mask,
        eos_token_id=eos,
        pad_token_id=pad,
        logit_shift=0,
        attention="bidirectional",
        lora_regex=architecture.lora_regex,
        head_name=architecture.head_name,
        max_length=masked_lm.longest_sequence(model_type, raw),
    )


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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_FAMILIES = {"llada": _llada, "Dream": _dream}

# Tokenizers whose class lies in their hub repository, and transformers' own class that reads the same files: byte-level
# BPE of vocab.json and merges.txt, Qwen2's pieces and NFC, special tokens of tokenizer_config.json.
_TOKENIZERS = {"DreamTokenizer": Qwen2Tokenizer}
