"""The recorded model, and the laws that it gives the recorded states.

Shapes: B rows, C completion positions, V vocabulary, N scored positions.
"""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from learner.likelihood.scorer import padded_support, restricted_logp
from learner.likelihood.views import ViewBatch, build_batch, step_view
from learner.verification.cases import HEAD_WIDTH, Arrays, Case, RecordedRollout, SamplerSettings, read_arrays
from learner.verification.measurement import Measurement, Meter
from rewards.errors import DataError
from rollout.models.family import PolicyAdapter, policy_adapter
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.loading import load_model
from rollout.sampling.truncation import Law, truncate

VIEWS_AT_ONCE = 64


@contextmanager
def recorded_model(
    weights: Arrays, meter: Meter, *, mask: int, eos: int, pad: int
) -> Iterator[tuple[torch.nn.Module, PolicyAdapter]]:
    """The recorded base, read through the product's loader from a checkpoint in a temporary folder.

    Yields:
        the model, and a family whose law may draw the mask token, as the reference's may.

    Raises:
        DataError: when the weights are not those of such a model.
    """
    vocabulary, width = weights.take("model.transformer.wte.weight", (None, None)).shape
    hidden, _ = weights.take("model.transformer.blocks.0.ff_proj.weight", (None, width)).shape
    names = [re.match(r"model\.transformer\.blocks\.(\d+)\.", name) for name in weights.by_name]
    config = {
        "model_type": "llada",
        "d_model": width,
        "n_layers": max(int(found[1]) for found in names if found) + 1,
        "n_heads": max(1, width // HEAD_WIDTH),
        "mlp_hidden_size": hidden,
        "vocab_size": vocabulary,
        "weight_tying": "model.transformer.ff_out.weight" not in weights.by_name,
        "mask_token_id": mask,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    if max(mask, eos, pad) >= vocabulary:
        raise DataError(f"the base weights have {vocabulary} tokens, the mask, EOS and pad ids are {mask, eos, pad}")
    with TemporaryDirectory(prefix="unmask-verify-") as folder:
        with torch.random.fork_rng(devices=[]):  # what its initial weights are drawn from
            model = LLaDAModelLM(LLaDAConfig.from_dict(config))
        weights.fill("", dict(model.named_parameters()))
        model.save_pretrained(folder)
        family = policy_adapter(folder)
        loaded: torch.nn.Module = load_model(folder, meter.dtype)
        yield loaded.to(meter.device), dataclasses.replace(family, mask_token_id=None)  # type: ignore[arg-type]


def check_probe(folder: Path, meter: Meter) -> list[Measurement]:
    """Logits of the recorded probe, with the padding mask and without. Raises DataError as ``read_arrays``."""
    arrays, weights = read_arrays(folder / "probe_logits.npz"), read_arrays(folder / "weights_base.npz")
    with recorded_model(weights, meter, mask=2, eos=1, pad=0) as (model, _):
        V = model.get_parameter("model.transformer.wte.weight").shape[0]
        ids_BL = arrays.take("input_ids", (None, None), "integers", within=(0, V - 1))
        mask_BL = arrays.take("attention_mask", ids_BL.shape, "integers", within=(0, 1))
        found = []
        for name in ("logits_no_mask", "logits_mask_honoured", "logits_mask_ignored"):
            seen = torch.from_numpy(mask_BL).to(meter.device) if name == "logits_mask_honoured" else None
            with torch.no_grad():
                ours = model(input_ids=torch.from_numpy(ids_BL).to(meter.device), attention_mask=seen).logits
            recorded = arrays.take(name, (*ids_BL.shape, V))
            found.append(meter.elements("logits", ours.float().cpu().numpy(), recorded, name))
    return found


def check_laws(case: Case, model: torch.nn.Module, family: PolicyAdapter, meter: Meter) -> list[Measurement]:
    """Log-prob and entropy of every drawn token under the recorded support, and that support itself, recomputed with
    the weights that drew it."""
    rollout, groups = case.rollout, case.rollout.groups()
    sampler, names = rollout.sampler, ("old_logps", "old_entropies")
    if isinstance(case.settings, SamplerSettings):
        names = ("logps", "entropies")
    temperature = sampler.temperature or 1.0  # greedy decoding records the law at temperature 1
    top_k, top_p = (sampler.top_k, sampler.top_p) if sampler.truncates else (None, 1.0)
    logp_BC, entropy_BC = np.zeros(rollout.drawn.shape), np.zeros(rollout.drawn.shape)
    kept_BCV = np.ones_like(rollout.kept)
    views = [
        step_view(group, row, 0, int(t), 0.0, 1.0)
        for row, group in enumerate(groups)
        for t in np.unique(group.unmask_step[group.drawn])
    ]
    for start in range(0, len(views), VIEWS_AT_ONCE):
        some = views[start : start + VIEWS_AT_ONCE]
        batch = build_batch(some, groups, mask_id=case.settings.mask, pad_id=case.settings.pad_id)
        rows_N = np.array([view.group for view in batch.views])[batch.view_of_score]
        positions_N = batch.position
        logits_NV = batch_logits(model, batch, torch.from_numpy(batch.score_rows))
        targets_N = torch.from_numpy(batch.targets).to(logits_NV.device)
        support = None if batch.support is None else padded_support(*batch.support)
        support_NK = None if support is None else torch.from_numpy(support).to(logits_NV.device)
        scores = restricted_logp(
            logits_NV, targets_N, support_NK, temperature=temperature, mask_token_id=family.mask_token_id
        )
        recorded_NV = torch.from_numpy(rollout.kept[rows_N, positions_N]).to(logits_NV.device)
        tempered_NV = logits_NV / temperature
        law = Law(tempered_NV.masked_fill(~recorded_NV, -torch.inf).log_softmax(-1), None)
        logp_BC[rows_N, positions_N] = scores.logp_N.cpu().numpy()
        entropy_BC[rows_N, positions_N] = law.entropy().cpu().numpy()
        kept_BCV[rows_N, positions_N] = _dense(truncate(tempered_NV, top_k=top_k, top_p=top_p), rollout.kept.shape[2])
    differing_BC = (kept_BCV != rollout.kept).sum(axis=2)
    return [
        meter.elements(names[0], logp_BC, rollout.logps),
        meter.elements(names[1], entropy_BC, rollout.entropies),
        _supports(meter, differing_BC, rollout),
    ]


def batch_logits(model: torch.nn.Module, batch: ViewBatch, rows_N: torch.Tensor) -> torch.Tensor:
    """[N, V] float32 logits of a batch at these flat positions."""
    device = next(model.parameters()).device
    mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask).to(device)
    ids = torch.from_numpy(batch.input_ids).to(device)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, logit_rows=rows_N.to(device)).logits.float()


def _supports(meter: Meter, differing_BC: np.ndarray, rollout: RecordedRollout) -> Measurement:
    """absolute: tokens kept by one and not by the other. relative: the same as a share of all tokens kept."""
    kept = rollout.kept[rollout.drawn].sum()
    worst = np.unravel_index(int(differing_BC.argmax()), differing_BC.shape)
    where = f"sampling_masks_packed[{', '.join(str(int(i)) for i in worst)}]" if differing_BC.any() else ""
    return meter.measured("sampling_masks", where, float(differing_BC.sum()), float(differing_BC.sum() / max(kept, 1)))


def _dense(law: Law, V: int) -> np.ndarray:
    """[N, V] bool, the tokens that a law keeps."""
    kept_NK = (law.logp_NK > -torch.inf).cpu().numpy()
    if law.ids_NK is None:
        return kept_NK
    kept_NV = np.zeros((len(kept_NK), V), bool)
    np.put_along_axis(kept_NV, law.ids_NK.cpu().numpy(), kept_NK, axis=1)
    return kept_NV
