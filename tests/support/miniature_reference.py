"""A second implementation of the reference AGRPO code, small and plain, that writes recorded cases of any kind.

Written from the format's README and the specification, in float64, with none of the product's code: model, sampler,
draws, losses and gradients. It exists so that ``learner.verify`` can be tried on kinds of cases that aren't shared.

Shapes: B rows, P prompt width, C completion positions, V vocabulary, L = P + C, m steps, k draws.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

PAD, EOS, MASK, V, D, HEADS, HIDDEN, LAYERS, P = 0, 1, 2, 14, 32, 2, 24, 1, 7
MAPS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
BASE = {"V": V, "mask": MASK, "eos": EOS, "pad_id": PAD, "top_k": 0, "top_p": 1.0}
TRAINING = {"lora_r": 3, "lora_alpha": 6, "lora_targets": list(MAPS), "importance_sampling": "uniform", "ld": True}
TRAINING |= {"unmasking": "random", "T": 0.8, "C": 8, "BL": 2, "m": 8, "B": 4, "G": 2, "k": 3, "beta": 0.0, "eps": 0.2}
TRAINING |= {"eps_high": None, "GA": 1, "impl": "hf", "pad": False}
SAMPLING = {"temperature": 1.0, "unmasking": "random", "max_completion_length": 8, "block_length": 2, "B": 3}
SAMPLING |= {"sampling_steps": 8}

Weights = dict[str, torch.Tensor]


def write_base(folder: Path) -> None:
    """weights_base.npz: random, with an EOS that is likely enough to end some rows early."""
    rng = np.random.default_rng(0)
    block = {"attn_norm": (D,), "ff_norm": (D,), "ff_proj": (HIDDEN, D), "up_proj": (HIDDEN, D), "ff_out": (D, HIDDEN)}
    block |= {name: (D, D) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
    shapes: dict[str, tuple[int, ...]] = {"wte": (V, D), "ln_f": (D,), "ff_out": (V, D)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in block.items()}
    arrays = {}
    for name, shape in shapes.items():
        value = 1 + 0.1 * rng.normal(size=shape) if len(shape) == 1 else rng.normal(size=shape) * 0.2
        if name == "wte":
            shared = rng.normal(size=D) * 0.2
            value = value + shared
        elif name == "ff_out":
            value[EOS] += shared
        arrays[f"model.transformer.{name}.weight"] = value.astype(np.float32)
    np.savez(folder / "weights_base.npz", **arrays)


def write_training_case(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> None:
    """A training case with these settings (the recorded names), and its ``pad`` rows of other prompt lengths."""
    s = {**BASE, **TRAINING, **changes, "case": name}
    rng = np.random.default_rng([1, seed])
    base = _base(folder)
    lora = s["lora_r"] > 0
    gen = _adapter(s["lora_r"], rng) if lora else base
    cur = {
        key: value + torch.from_numpy(rng.normal(size=value.shape) * 0.03).float().double()
        for key, value in gen.items()
    }
    policy = _Policy(base, s, lora)
    a, drawn = _rollout(policy, gen, s, s["C"], s["BL"], s["m"], s["T"], rng)
    a.pop("noise")
    B, m, k, U = s["B"], s["m"], s["k"], s["C"] // s["m"]
    ids, steps = a["completion_ids"], a["unmask_steps"]
    a |= {"old_logps": a.pop("logps"), "old_entropies": a.pop("entropies")}
    a["rewards_per_func"] = np.stack([rng.permutation(B), np.arange(B) % 2], axis=1).astype(np.float32) / 16
    total = a["rewards_per_func"].sum(axis=1).reshape(-1, s["G"])
    a["advantages"] = (total - total.mean(axis=1, keepdims=True)).ravel()
    a["u"] = ((rng.permutation(B * k) + rng.random(B * k)) / (B * k)).reshape(B, k).astype(np.float32)
    last = np.where(ids != EOS, steps, -1).max(axis=1)
    a["last_step"] = last[:, None]
    a["mc_steps"], a["importance_weights"] = np.floor(a["u"] * (last + 1)[:, None]).astype(int), np.ones((B, k))
    if s["importance_sampling"] == "entropy":
        H = np.array([[1e-8 + a["old_entropies"][b][steps[b] == t].sum() if t <= last[b] else 0.0 for t in range(m)]
                      for b in range(B)])  # fmt: skip
        a["step_probs"] = H / H.sum(axis=1, keepdims=True)
        a["step_cdf"] = a["step_probs"].cumsum(axis=1)
        a["mc_steps"] = np.array([np.searchsorted(a["step_cdf"][b], a["u"][b]) for b in range(B)])
        a["importance_weights"] = 1 / (last + 1)[:, None] / np.take_along_axis(a["step_probs"], a["mc_steps"], axis=1)
    a["mc_positions"] = np.array(
        [[np.flatnonzero(steps[b] == a["mc_steps"][b, i]) for b in range(B)] for i in range(k)]
    )
    for key in ("new_logps", "old_logps_at_step", "ref_logps"):
        a[key] = np.zeros((k, B, U))
    for key in ("loss_per_mc_sample", "loss_passed_to_backward", "cum_grad_norm", "low_clip", "high_clip", "kls"):
        a[key] = np.zeros(k)
    leaves = {key: value.clone().requires_grad_() for key, value in cur.items()}
    high = s["eps"] if s["eps_high"] is None else s["eps_high"]
    for i in range(k):
        t, at = a["mc_steps"][:, i], a["mc_positions"][i]
        x = np.where(steps >= t[:, None], MASK, ids)
        kept = np.take_along_axis(drawn["kept"], at[:, :, None], axis=1)
        token = torch.from_numpy(np.take_along_axis(ids, at, axis=1))

        def logp(weights: Weights | None, x: np.ndarray = x, at: np.ndarray = at, kept: np.ndarray = kept,
                 token: torch.Tensor = token) -> torch.Tensor:  # fmt: skip
            rows = policy(weights, a["prompt_ids"], a["prompt_mask"], x)[np.arange(B)[:, None], at] / s["T"]
            law = rows.masked_fill(torch.from_numpy(~kept), -torch.inf).log_softmax(-1)
            return law.gather(-1, token[:, :, None]).squeeze(-1)

        new, ref = logp(leaves), logp(None if lora else base).detach()
        old = torch.from_numpy(np.take_along_axis(a["old_logps"], at, axis=1))
        A, w = (
            torch.from_numpy(np.asarray(v, dtype=np.float64))[:, None]
            for v in (a["advantages"], a["importance_weights"][:, i])
        )
        ratio = (new - old).exp()
        k3 = (ref - new).exp() - (ref - new) - 1
        clipped = torch.clamp(ratio, 1 - s["eps"], 1 + high)
        per_token = w * (-torch.minimum(ratio * A, clipped * A) + s["beta"] * ratio * k3)
        loss = per_token.sum() / (k * s["G"])
        passed = loss / (s["GA"] if i < k - 1 else 1)
        passed.backward()
        a["new_logps"][i], a["ref_logps"][i], a["old_logps_at_step"][i] = new.detach(), ref, old
        a["loss_per_mc_sample"][i], a["loss_passed_to_backward"][i] = loss.item(), passed.item()
        a["kls"][i] = (ratio * k3).mean().item()
        a["low_clip"][i] = ((ratio < 1 - s["eps"]) & (A < 0)).double().mean()
        a["high_clip"][i] = ((ratio > 1 + high) & (A > 0)).double().mean()
        a["cum_grad_norm"][i] = math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves.values()))
    if not s["beta"]:
        del a["ref_logps"], a["kls"]
    if lora:
        a |= {f"gen/{key}": value.numpy() for key, value in gen.items()}
    a |= {f"cur/{key}": value.numpy() for key, value in cur.items()}
    a |= {f"grad/{key}": leaf.grad.numpy() for key, leaf in leaves.items()}
    _save(folder, name, a, s)


def write_sampler_case(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> None:
    """A sampler case with its noise."""
    s = {**BASE, **SAMPLING, **changes, "case": name}
    rng = np.random.default_rng([2, seed])
    policy = _Policy(_base(folder), s, lora=False)
    sizes = (s["max_completion_length"], s["block_length"], s["sampling_steps"], s["temperature"])
    a, _ = _rollout(policy, policy.base, s, *sizes, rng)
    noise = a.pop("noise")
    a |= {f"rand_{i:03d}": array for i, array in enumerate(noise)}
    _save(folder, name, a, {**s, "n_rand_calls": len(noise)})


class _Policy:
    """Logits [B, C, V] float64 of the completion, under the base with an adapter, or under other whole weights."""

    def __init__(self, base: Weights, settings: dict[str, Any], lora: bool) -> None:
        self.base, self.lora, self.honoured = base, lora, settings.get("impl", "hf") == "hf"
        self.scale = settings.get("lora_alpha", 1) / max(1, settings.get("lora_r", 1))

    def __call__(self, given: Weights | None, prompt: np.ndarray, seen: np.ndarray, x: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.concatenate([prompt, x], axis=1))
        keys = torch.from_numpy(np.concatenate([seen, np.ones_like(x)], axis=1)).bool()
        weights = self.base if self.lora or given is None else given

        def linear(x_BLD: torch.Tensor, name: str) -> torch.Tensor:
            key = f"model.transformer.{name}"
            out = x_BLD @ weights[f"{key}.weight"].T
            if self.lora and given is not None:
                out = out + self.scale * (x_BLD @ given[f"{key}.lora_A.weight"].T) @ given[f"{key}.lora_B.weight"].T
            return out

        def norm(x_BLD: torch.Tensor, name: str) -> torch.Tensor:
            return weights[f"model.transformer.{name}.weight"] * x_BLD * (x_BLD.square().mean(-1, True) + 1e-5).rsqrt()

        def turned(x_BLD: torch.Tensor) -> torch.Tensor:
            B, L, _ = x_BLD.shape
            heads = x_BLD.view(B, L, HEADS, D // HEADS).transpose(1, 2)
            half = D // HEADS // 2
            angle = torch.arange(L)[:, None] * 500000.0 ** -(torch.arange(half).double() / half)
            first, second = heads[..., :half], heads[..., half:]
            cos, sin = angle.cos(), angle.sin()
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        h = weights["model.transformer.wte.weight"][ids]
        B, L = ids.shape
        for i in range(LAYERS):
            n = norm(h, f"blocks.{i}.attn_norm")
            q, key = turned(linear(n, f"blocks.{i}.q_proj")), turned(linear(n, f"blocks.{i}.k_proj"))
            value = linear(n, f"blocks.{i}.v_proj").view(B, L, HEADS, -1).transpose(1, 2)
            scores = q @ key.transpose(-1, -2) / math.sqrt(D // HEADS)
            if self.honoured:
                scores = scores.masked_fill(~keys[:, None, None, :], -torch.inf)
            mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(B, L, D)
            h = h + linear(mixed, f"blocks.{i}.attn_out")
            n = norm(h, f"blocks.{i}.ff_norm")
            gate = linear(n, f"blocks.{i}.ff_proj")
            h = h + linear(gate * gate.sigmoid() * linear(n, f"blocks.{i}.up_proj"), f"blocks.{i}.ff_out")
        return linear(norm(h, "ln_f"), "ff_out")[:, -x.shape[1] :]


def _rollout(
    policy: _Policy, weights: Weights, s: dict[str, Any], C: int, BL: int, m: int, T: float, rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    B, U = s["B"], C // m
    prompt, seen = rng.integers(3, V, (B, P)), np.ones((B, P), np.int64)
    for b in range(B):
        if s.get("pad"):
            prompt[b, : b % 4], seen[b, : b % 4] = PAD, 0
    x, steps = np.full((B, C), MASK), np.full((B, C), -1)
    logps, entropies, kept_BCV = np.zeros((B, C)), np.zeros((B, C)), np.ones((B, C, V), bool)
    live, noise, step = list(range(B)), [], 0
    for start in range(0, C, BL):
        for b in [b for b in live if start and (x[b, start - BL : start] == EOS).all()]:
            x[b, start:], steps[b, start:] = EOS, step
            live.remove(b)
        if not live:
            break
        for _ in range(BL // U):
            with torch.no_grad():
                logits = policy(weights, prompt[live], seen[live], x[live])[:, start : start + BL].numpy()
            tempered = logits / (T or 1.0)
            kept = _kept(tempered, s["top_k"], s["top_p"]) if T else np.ones(logits.shape, bool)
            law = np.where(kept, tempered, -np.inf)
            law = law - np.log(np.exp(law).sum(axis=-1, keepdims=True))
            entropy = -np.where(kept, np.exp(law) * np.where(kept, law, 0), 0).sum(axis=-1)
            if T:
                noise.append(rng.random(law.shape))
                token = (np.exp(law) / -np.log(noise[-1])).argmax(axis=-1)
            else:
                token = law.argmax(axis=-1)
            chosen = np.take_along_axis(law, token[:, :, None], axis=-1).squeeze(-1)
            score = {"low_confidence": chosen, "entropy": -entropy}.get(s["unmasking"])
            if score is None:
                noise.append(rng.random(chosen.shape).astype(np.float32))
                score = noise[-1].astype(np.float64)
            for i, b in enumerate(live):
                at = np.argsort(-np.where(steps[b, start : start + BL] < 0, score[i], -np.inf), kind="stable")[:U]
                x[b, start + at], steps[b, start + at] = token[i, at], step
                logps[b, start + at], entropies[b, start + at] = chosen[i, at], entropy[i, at]
                kept_BCV[b, start + at] = kept[i, at]
            step += 1
    arrays = {
        "prompt_ids": prompt,
        "prompt_mask": seen.astype(np.uint8),
        "completion_ids": x,
        "unmask_steps": steps,
        "sampling_masks_packed": np.packbits(kept_BCV, axis=-1, bitorder="little"),
        "logps": logps,
        "entropies": entropies,
        "noise": noise,
    }
    return arrays, {"kept": kept_BCV}


def _kept(tempered: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    kept = np.ones(tempered.shape, bool)
    for cell in np.ndindex(tempered.shape[:2]):
        row = tempered[cell]
        if top_k:
            kept[cell] = row >= np.sort(row)[-top_k]
        order = [v for v in np.argsort(-row, kind="stable") if kept[cell][v]]
        mass = np.cumsum(np.exp(row[order]) / np.exp(row[order]).sum())
        for rank, v in enumerate(order):
            kept[cell][v] = rank == 0 or top_p >= 1 or mass[rank] <= top_p
    return kept


def _adapter(r: int, rng: np.random.Generator) -> Weights:
    shapes = {"ff_out": (V, D)} | {f"blocks.{i}.{name}": (D, D) for i in range(LAYERS) for name in MAPS[:4]}
    for i in range(LAYERS):
        shapes |= {f"blocks.{i}.{name}": (HIDDEN, D) for name in ("ff_proj", "up_proj")} | {
            f"blocks.{i}.ff_out": (D, HIDDEN)
        }
    found = {}
    for name, (out, size) in shapes.items():
        for part, shape in (("lora_A", (r, size)), ("lora_B", (out, r))):
            found[f"model.transformer.{name}.{part}.weight"] = (
                torch.from_numpy(rng.normal(size=shape) * 0.1).float().double()
            )
    return found


def _base(folder: Path) -> Weights:
    with np.load(folder / "weights_base.npz") as file:
        return {name: torch.from_numpy(file[name]).double() for name in file.files}


def _save(folder: Path, name: str, arrays: dict[str, Any], settings: dict[str, Any]) -> None:
    doubles = ("loss_per_mc_sample", "loss_passed_to_backward", "cum_grad_norm")
    plain = {}
    for key, array in arrays.items():
        keep = key in doubles or key.startswith("rand_") or array.dtype.kind != "f"
        plain[key] = array if keep else array.astype(np.float32)
    np.savez(folder / f"{name}.npz", **plain)
    (folder / f"{name}.json").write_text(json.dumps(settings))
