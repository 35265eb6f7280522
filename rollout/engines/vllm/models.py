"""The policies as vLLM's models: its Llama without an order, and a pooler that takes the asked rows and draws.

Names on disk are the published ones; the mappers say which of vLLM's weights they are. Imported by vLLM alone, in its
worker, from the names in ``rollout.engines.vllm.plugin``.

Shapes: T tokens of all sequences of a pass, D model width, N asked positions.
"""

import re
from collections.abc import Iterable, Set
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.models.interfaces_base import attn_type, default_pooling_type
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeSparseMoeBlock
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, extract_layer_index

from rollout.engines.vllm import shim
from rollout.engines.vllm.wire import KEY, RowAnswer, RowAsked, part
from rollout.sampling.head import chooses_before_drawing, confidence, draw, fill_all
from rollout.sampling.truncation import Law
from rollout.trajectory import SamplerSpec


class DenoisingPooler(Pooler):  # type: ignore[misc]
    """Draws at the asked positions, and at no others does the LM head run.

    Rows are drawn with those that have the same sampler, by operations that treat each row alone: what a row draws
    depends on no other.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        # Not as submodules: the head's weights would be there twice.
        object.__setattr__(self, "_model", model)
        self._mask = model.config.mask_token_id

    def get_supported_tasks(self) -> Set[str]:
        return {"token_classify"}

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor]:
        lengths = pooling_metadata.get_pooling_cursor().num_scheduled_tokens_cpu.numpy()
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        known = [params.extra_kwargs or {} for params in pooling_metadata.pooling_params]
        if not all(KEY in own for own in known):  # vLLM's own passes when it starts
            return [hidden_states[:1, :1].float() for _ in known]
        rows = [RowAsked.of(own[KEY]) for own in known]
        at = [start + row.token_M for start, row in zip(starts, rows, strict=True)]
        index = torch.from_numpy(np.concatenate(at)).to(hidden_states.device)
        logits = self._model.compute_logits(hidden_states[index])
        if logits is None:  # of the tensor parallel ranks the first gets them
            return [hidden_states[:1, :1].float() for _ in rows]
        parts = logits.split([len(of_row) for of_row in at])
        adapters = shim.adapters_of_rows(self._model, starts)
        return [answer.pack(row) for answer, row in zip(_answers(rows, parts, adapters, self._mask), rows, strict=True)]


def _answers(
    rows: list[RowAsked], parts: tuple[torch.Tensor, ...], adapters: list[int], mask: int
) -> Iterable[RowAnswer]:
    alike: dict[SamplerSpec, list[int]] = {}
    for r, row in enumerate(rows):
        alike.setdefault(row.sampler, []).append(r)
    answers: dict[int, RowAnswer] = {}
    for sampler, members in alike.items():
        sizes = [rows[r].position_N.size for r in members]
        logits_NV = torch.cat([parts[r][:size] for r, size in zip(members, sizes, strict=True)])
        drawn, law = draw(
            logits_NV,
            np.repeat(np.array([rows[r].key for r in members], np.int64), sizes),
            np.repeat(np.array([rows[r].step for r in members], np.int64), sizes),
            np.concatenate([rows[r].position_N for r in members]),
            sampler,
            mask,
        )
        sure_N = confidence(logits_NV, sampler, mask).numpy() if chooses_before_drawing(sampler) else None
        ends = np.cumsum(sizes)
        supports = _supports(law, ends) if sampler.truncates else [None] * len(members)
        for r, support, own in zip(members, supports, np.split(np.arange(ends[-1]), ends[:-1]), strict=True):
            answers[r] = RowAnswer(
                adapter=adapters[r],
                drawn=part(drawn, own),
                confidence_N=None if sure_N is None else sure_N[own],
                fills=_fills(rows[r], parts[r][own.size :], mask),
                support=support,
            )
    return (answers[r] for r in range(len(rows)))


def _supports(law: Law, ends: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each row; ``ends``: of their positions."""
    count_N, ids = (found.cpu().numpy() for found in law.support())
    of_rows = np.split(count_N, ends[:-1])
    return list(zip(of_rows, np.split(ids, np.cumsum([c.sum() for c in of_rows])[:-1]), strict=True))


def _fills(row: RowAsked, logits: torch.Tensor, mask: int) -> tuple[Any, ...]:
    of_fills = logits.split([f.position_B.size for f in row.fills]) if row.fills else ()
    return tuple(fill_all(of_fills, row.fills, [row.step] * len(row.fills), row.sampler, mask))


@attn_type("encoder_only")
@default_pooling_type(tok_pooling_type="ALL")
class Denoiser(LlamaForCausalLM):  # type: ignore[misc]
    """Llama over which ``DenoisingPooler`` draws. A family says how its names map and which layer it has."""

    is_pooling_model = True
    layer: type[nn.Module] = LlamaDecoderLayer
    names = WeightsMapper()

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer)
        self.pooler = DenoisingPooler(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names)


class LLaDA(Denoiser):
    """Published names: ``rollout.models.llada``. Its ``ff_out`` is the head at the top and the MLP's map in a block."""

    names = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^model\.transformer\.blocks\.(\d+)\.(q|k|v)_proj\."): r"model.layers.\1.self_attn.\2_proj.",
            re.compile(r"^model\.transformer\.blocks\.(\d+)\.attn_out\."): r"model.layers.\1.self_attn.o_proj.",
            re.compile(r"^model\.transformer\.blocks\.(\d+)\.ff_proj\."): r"model.layers.\1.mlp.gate_proj.",
            re.compile(r"^model\.transformer\.blocks\.(\d+)\.up_proj\."): r"model.layers.\1.mlp.up_proj.",
            re.compile(r"^model\.transformer\.blocks\.(\d+)\.ff_out\."): r"model.layers.\1.mlp.down_proj.",
            re.compile(r"^model\.transformer\.blocks\.(\d+)\.attn_norm\."): r"model.layers.\1.input_layernorm.",
            re.compile(r"^model\.transformer\.blocks\.(\d+)\.ff_norm\."): r"model.layers.\1.post_attention_layernorm.",
            re.compile(r"^model\.transformer\.wte\."): "model.embed_tokens.",
            re.compile(r"^model\.transformer\.ln_f\."): "model.norm.",
            re.compile(r"^model\.transformer\.ff_out\."): "lm_head.",
        }
    )
    hf_to_vllm_mapper = names  # what vLLM reads an adapter's names by


class Dream(Denoiser):
    """Published names are Llama's; queries, keys and values have biases (``qkv_bias`` of the config)."""

    hf_to_vllm_mapper = names = WeightsMapper()


class NormedAttention(LlamaAttention):  # type: ignore[misc]
    """Each head's query and key are normalised before they are turned."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class MixtureLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """Experts for the MLP, in the layers that ``moe_layer_freq`` of the config says."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=NormedAttention)
        if vllm_config.model_config.hf_config.moe_layer_freq[extract_layer_index(prefix)]:
            with shim.without_lora(vllm_config) as bare:
                self.mlp = Qwen3MoeSparseMoeBlock(vllm_config=bare, prefix=f"{prefix}.mlp")


class LLaDAMoE(Denoiser):
    """Published names: ``rollout.models.llada_moe``."""

    layer = MixtureLayer
    hf_to_vllm_mapper = names = WeightsMapper()

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Llama's own would take the experts' maps for those of a dense MLP.
        stacked: dict[str, Any] = {f".{x}_proj": (".qkv_proj", x) for x in "qkv"}
        stacked |= {".mlp.gate_proj": (".mlp.gate_up_proj", 0), ".mlp.up_proj": (".mlp.gate_up_proj", 1)}
        self.model.hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked=stacked)
