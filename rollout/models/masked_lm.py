"""Masked language models of transformers, BERT and its relatives, as diffusion policies.

A masked LM is a denoiser as it is: bidirectional, and its logits at a masked position predict that position's token
(logit shift 0). The classes here are transformers' own with another ``forward``: names, config.json and weights on disk
stay what transformers writes and reads, ``architectures`` included. Four things differ from the class in transformers:
the head runs on the wanted rows only (the last block, unlike that of the other families, on all); pads are never seen
and never shift a position; rows may be packed; and dropout stays off in training, because a policy that is scored under
other weights than it acted with has no importance ratio.

Shapes: B rows, L positions, D model width, V vocabulary, N wanted rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from rewards.errors import ConfigError
from rollout.models.head import Head


@dataclass(frozen=True)
class Architecture:
    """What differs between the masked LMs. ``lora_regex`` and ``head_name`` as in ``PolicyAdapter``."""

    class_name: str
    """The class in transformers."""
    head: Callable[[Any, Tensor], Tensor]
    """(model, hidden states [..., D]) -> logits [..., V]."""
    lora_regex: str
    head_name: str
    positions: Literal["relative", "absolute", "absolute_after_pad_id"]
    """relative: rotary. absolute: an embedding per position, counted from 0. absolute_after_pad_id: from the pad's id
    plus 1, as RoBERTa counts."""
    embed: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None
    """(model, input_ids, attention_mask as in ``forward``) -> embeddings [B, L, D], for a model whose embedding of a
    token depends on others; None: on none."""
    layer: str | None = None
    """Class of the layers, where transformers can't compute them again in the backward and this module makes it so."""


_BERT_LAYER = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
)


def _roberta(class_name: str) -> Architecture:
    return Architecture(
        class_name=class_name,
        head=lambda model, hidden: model.lm_head(hidden),
        lora_regex=rf"roberta\.{_BERT_LAYER}",
        head_name="lm_head.decoder",
        positions="absolute_after_pad_id",
    )


def _esm_embeddings(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """ESM takes masking for dropout: a mask's embedding is 0, and the others are scaled by the share of tokens that was
    left in training over the share that is left here (Rives et al. 2021, https://doi.org/10.1073/pnas.2016239118). So
    an embedding depends on how many masks its sequence holds; transformers counts those of the whole row."""
    embeddings = model.esm.embeddings
    embedded = embeddings.word_embeddings(input_ids)
    if embeddings.token_dropout:
        left = input_ids != model.config.mask_token_id
        if attention_mask is None:
            tokens, unmasked = left.shape[1], left.sum(-1, keepdim=True)
        else:
            same_BLL = attention_mask[:, :, None] == attention_mask[:, None, :]
            tokens, unmasked = same_BLL.sum(-1), (same_BLL & left[:, None, :]).sum(-1)
        share = unmasked.clamp(min=1) / tokens  # nothing is scaled where all are masks
        embedded = (embedded * left[..., None] * (1 - 0.15 * 0.8) / share[..., None]).to(embedded.dtype)
    return embedded if embeddings.layer_norm is None else embeddings.layer_norm(embedded)


ARCHITECTURES = {
    "modernbert": Architecture(
        class_name="ModernBertForMaskedLM",
        head=lambda model, hidden: model.decoder(model.head(hidden)),
        lora_regex=r"model\.layers\.\d+\.(attn\.(Wqkv|Wo)|mlp\.(Wi|Wo))",
        head_name="decoder",
        positions="relative",
    ),
    "eurobert": Architecture(
        class_name="EuroBertForMaskedLM",
        head=lambda model, hidden: model.lm_head(hidden),
        lora_regex=r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
        head_name="lm_head",
        positions="relative",
    ),
    "bert": Architecture(
        class_name="BertForMaskedLM",
        head=lambda model, hidden: model.cls(hidden),
        lora_regex=rf"bert\.{_BERT_LAYER}",
        head_name="cls.predictions.decoder",
        positions="absolute",
    ),
    "distilbert": Architecture(
        class_name="DistilBertForMaskedLM",
        head=lambda model, hidden: model.vocab_projector(
            model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))
        ),
        lora_regex=r"distilbert\.transformer\.layer\.\d+\.(attention\.(q|k|v|out)_lin|ffn\.lin[12])",
        head_name="vocab_projector",
        positions="absolute",
    ),
    "electra": Architecture(
        class_name="ElectraForMaskedLM",
        head=lambda model, hidden: model.generator_lm_head(model.generator_predictions(hidden)),
        lora_regex=rf"electra\.{_BERT_LAYER}",
        head_name="generator_lm_head",
        positions="absolute",
    ),
    "albert": Architecture(
        class_name="AlbertForMaskedLM",
        head=lambda model, hidden: model.predictions(hidden),
        # A layer that stands for several of them has one adapter.
        lora_regex=(
            r"albert\.encoder\.albert_layer_groups\.\d+\.albert_layers\.\d+\."
            r"(attention\.(query|key|value|dense)|ffn|ffn_output)"
        ),
        head_name="predictions.decoder",
        positions="absolute",
        layer="AlbertLayer",
    ),
    "esm": Architecture(
        class_name="EsmForMaskedLM",
        head=lambda model, hidden: model.lm_head(hidden),
        lora_regex=rf"esm\.{_BERT_LAYER}",
        head_name="lm_head.decoder",
        positions="relative",
        embed=_esm_embeddings,
    ),
    "roberta": _roberta("RobertaForMaskedLM"),
    "xlm-roberta": _roberta("XLMRobertaForMaskedLM"),
    "camembert": _roberta("CamembertForMaskedLM"),
}
"""By the model type of config.json. Other masked LMs of transformers are refused: those with attention of their own
(DeBERTa, MPNet, Longformer, ...) don't take the masks that packing needs, and none was tested."""


@functools.cache
def model_class(model_type: str) -> type[PreTrainedModel]:
    """transformers' class for this model type with the policy's ``forward``, under the same name."""
    original = getattr(transformers, ARCHITECTURES[model_type].class_name)
    # The module too: transformers treats classes of other packages as custom code.
    members: dict[str, Any] = {"__module__": original.__module__, "__doc__": _Policy.__doc__}
    if ARCHITECTURES[model_type].layer is not None:
        members["supports_gradient_checkpointing"] = True
    return type(original.__name__, (_Policy, original), members)


@functools.cache
def _recomputable(layer: Any) -> Any:
    """The layer's class, whose forward can be computed again in the backward."""
    return type(layer.__name__, (GradientCheckpointingLayer, layer), {"__module__": layer.__module__})


def longest_sequence(model_type: str, config: dict[str, Any]) -> int | None:
    """Tokens that a sequence may have, prompt and completion together; None when config.json doesn't say."""
    positions = config.get("max_position_embeddings")
    if positions is None or ARCHITECTURES[model_type].positions != "absolute_after_pad_id":
        return positions
    return int(positions) - int(config.get("pad_token_id", 1)) - 1


def special_tokens(model_path: str, tokenizer: Any, vocabulary: int | None) -> tuple[int, int, int]:
    """(mask, EOS, pad) ids. EOS is the tokenizer's own, or else its separator: a completion ends as a segment does.

    Raises ConfigError when the tokenizer has no mask or no end, or one beyond the model's vocabulary.
    """
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    found = {"mask": tokenizer.mask_token_id, "EOS or separator": eos, "pad": tokenizer.pad_token_id}
    for name, token in found.items():
        if token is None:
            raise ConfigError(f"the tokenizer of {model_path} has no {name} token, which a diffusion policy needs")
        if vocabulary is not None and token >= vocabulary:
            raise ConfigError(
                f"the tokenizer of {model_path} has its {name} token at {token}, beyond the model's vocabulary of "
                f"{vocabulary}; tokenizer and weights don't belong together"
            )
    return found["mask"], eos, found["pad"]


class _Policy(PreTrainedModel):
    """A masked LM as a diffusion policy. Mixed in before transformers' own class, whose weights and names it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Its weights stay where transformers ties them, so the map itself is kept and computes otherwise.
        architecture = ARCHITECTURES[self.config.model_type]
        self.get_submodule(architecture.head_name).__class__ = Head
        layers = [module for module in self.modules() if type(module).__name__ == architecture.layer]
        assert layers or architecture.layer is None, f"transformers has no {architecture.layer} any more"
        for module in layers:
            layer: Any = type(module)
            module.__class__ = _recomputable(layer)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return super().from_pretrained(*args, **{"attn_implementation": "sdpa", **kwargs})

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logit_rows: Tensor | None = None
    ) -> MaskedLMOutput:
        """Logits of every position, or of the rows named.

        input_ids: [B, L] int64. attention_mask: [B, L]; 0 is a pad, equal positive numbers see each other and nobody
        else (1 everywhere: one sequence a row); a segment's tokens stand together. None when nothing is padded or
        packed. logit_rows: [N] int64, flat indices ``b * L + l``.

        Returns an output whose ``logits``, float32, are [B, L, V], or [N, V] with logit_rows. Logits at pads are finite
        and mean nothing.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": None}
        architecture = ARCHITECTURES[self.config.model_type]
        if attention_mask is not None:
            # Pads are a segment that no token is in: they see each other, so that no row of a softmax is empty.
            seen_B1LL = attention_mask[:, None, :, None] == attention_mask[:, None, None, :]
            inputs["attention_mask"] = self._by_layer_type(seen_B1LL)
        if architecture.positions != "relative":
            inputs["position_ids"] = self._first_position() + _places(input_ids, attention_mask)
        if architecture.embed is not None:
            inputs["inputs_embeds"] = architecture.embed(self, inputs.pop("input_ids"), attention_mask)
        hidden: Tensor = self.base_model(**inputs).last_hidden_state
        if logit_rows is not None:
            hidden = hidden.flatten(0, 1).index_select(0, logit_rows)
        return MaskedLMOutput(logits=architecture.head(self, hidden))  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> "_Policy":
        """Training mode reaches only the layers that may be recomputed; everything that could drop out stays off."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def _first_position(self) -> int:
        after_pad = ARCHITECTURES[self.config.model_type].positions == "absolute_after_pad_id"
        return self.config.pad_token_id + 1 if after_pad else 0

    def _by_layer_type(self, seen_B1LL: Tensor) -> Tensor | dict[str, Tensor]:
        """The mask, or ModernBERT's two: some of its layers see a window only."""
        if self.config.model_type != "modernbert":
            return seen_B1LL
        place_L = torch.arange(seen_B1LL.shape[-1], device=seen_B1LL.device)
        near_LL = (place_L[:, None] - place_L).abs() <= self.config.sliding_window
        return {"full_attention": seen_B1LL, "sliding_attention": seen_B1LL & near_LL}


def _places(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, L] int64: how many tokens of its own segment stand before each token; 0 at pads, of which a packed row may
    hold more than there are positions."""
    if attention_mask is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    same_BLL = attention_mask[:, :, None] == attention_mask[:, None, :]
    return same_BLL.tril(-1).sum(-1).where(attention_mask > 0, 0)
