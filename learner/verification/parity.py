"""Replay parity: the learner finds the log-probs of a fresh rollout again.

Shapes: D width of the model.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from learner.likelihood.scorer import score
from learner.likelihood.views import View, build_batch, step_view
from learner.verification.measurement import Measurement, Meter
from rewards.task import Problem
from rollout.adapters import adapter_parameters, digest, load_state, pack
from rollout.engines.torch import TorchEngine
from rollout.models.family import policy_adapter
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.loading import load_model
from rollout.models.lora import LoraSpec, attach_lora
from rollout.models.tokenizer import build_tokenizer
from rollout.sampling.denoise import POSITION_RULES
from rollout.spans import Gap
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup

LORA = LoraSpec(r=4, alpha=8.0)
TEMPERATURE = 0.7
TRUNCATIONS = {"whole law": (None, 1.0), "top-k and top-p": (20, 0.95)}
PROMPT_LENGTHS = (10, 13, 19)
GAPS: tuple[tuple[Gap, ...], ...] = ((), (Gap(2, (3, 9)), Gap(7, (6,))), ())
"""Of each prompt; none: its completions follow it."""
ROWS, VIEWS_AT_ONCE = 3, 7
EOS_BIAS = 4.0


def check_replay(meter: Meter) -> Iterator[tuple[str, list[Measurement]]]:
    """Named checks, one for each position rule and truncation: roll out with the engine, score with the learner's
    batches, which mix prompts, rows and steps unlike any batch of the rollout."""
    with TemporaryDirectory(prefix="unmask-verify-") as folder:
        write_small_model(Path(folder))
        engine = TorchEngine(model_path=folder, lora=LORA, max_rows=5, device=meter.device, dtype=meter.dtype)
        _act(engine)
        learner = attach_lora(load_model(folder, meter.dtype), policy_adapter(folder), LORA)
        load_state(learner, pack(adapter_parameters(engine.model)))
        learner = learner.to(meter.device).train()
        for rule in POSITION_RULES:
            for name, (top_k, top_p) in TRUNCATIONS.items():
                sampler = SamplerSpec(24, 4, 12, rule, TEMPERATURE, top_k, top_p)  # type: ignore[arg-type]
                specs = [GroupSpec(i, Problem(str(i), {}), ROWS, 50 + i) for i in range(len(PROMPT_LENGTHS))]
                prompts = [list(range(10, 10 + length)) for length in PROMPT_LENGTHS]
                groups = engine.generate(specs, prompts, sampler, gaps=GAPS)
                yield f"{rule}, {name}", _compare(meter, learner, engine, groups)


def write_small_model(folder: Path) -> None:
    """A random LLaDA (d 64, 2 layers) whose EOS is likely enough that some completions end early; with tokenizer."""
    tokenizer = build_tokenizer()
    config = LLaDAConfig(
        d_model=64,
        n_layers=2,
        n_heads=4,
        mlp_hidden_size=128,
        vocab_size=len(tokenizer),
        init_std=0.1,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LLaDAModelLM(config)
        # A part that all hidden states share, and EOS's row of the head along it: a bias without a bias term.
        shared_D = torch.randn(config.d_model) * config.init_std
        model.get_parameter("model.transformer.wte.weight").add_(shared_D)
        model.get_parameter("model.transformer.ff_out.weight")[config.eos_token_id].add_(shared_D * EOS_BIAS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recorded_states(groups: Sequence[TrajectoryGroup]) -> list[View]:
    """Every state that the rollouts went through and drew something in, of weight and credit 1."""
    return [
        step_view(group, g, row, int(step), 1.0, 1.0)
        for g, group in enumerate(groups)
        for row in range(group.size)
        for step in np.unique(group.unmask_step[row][group.drawn[row]])
    ]


def _act(engine: TorchEngine) -> None:
    """Give the engine an adapter that changes what the base does (a fresh one's B matrices are 0)."""
    generator = torch.Generator().manual_seed(5)
    parameters = adapter_parameters(engine.model)
    state = pack(
        {
            name: torch.randn(p.shape, generator=generator).to(p.dtype) * 0.05 if ".lora_B." in name else p
            for name, p in parameters.items()
        }
    )
    engine.load_adapter(0, state, digest(state))


def _compare(
    meter: Meter, learner: torch.nn.Module, engine: TorchEngine, groups: list[TrajectoryGroup]
) -> list[Measurement]:
    family = engine.family
    views = recorded_states(groups)
    order = np.random.default_rng(0).permutation(len(views))
    tokens: list[tuple[np.ndarray, np.ndarray]] = []
    choices: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, len(views), VIEWS_AT_ONCE):
        some = [views[i] for i in order[start : start + VIEWS_AT_ONCE]]
        batch = build_batch(some, groups, mask_id=family.mask_token_id, pad_id=family.pad_token_id)
        with torch.no_grad():
            scores = score(learner, batch, family=family)
        assert batch.logp is not None
        tokens.append((scores.logp_N.cpu().numpy(), batch.logp))
        if batch.choices is not None and scores.choice_logp_Z is not None:
            free_Z = batch.choices.free
            choices.append((scores.choice_logp_Z.cpu().numpy()[free_Z], batch.choices.logp[free_Z]))
    drawn = sum(int(group.drawn.sum()) for group in groups)
    assert sum(theirs.size for _, theirs in tokens) == drawn, "not every drawn token was scored"
    early = sum(int((~group.drawn & group.there).any(axis=1).sum()) for group in groups)
    found = [_worst(meter, "replayed log-probs", tokens, f"{drawn} tokens, {early} rows ended early")]
    if choices:
        chosen = sum(theirs.size for _, theirs in choices)
        found.append(_worst(meter, "replayed choices", choices, f"{chosen} choices of positions"))
    return found


def _worst(meter: Meter, quantity: str, pairs: list[tuple[np.ndarray, np.ndarray]], where: str) -> Measurement:
    ours, theirs = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return dataclasses.replace(meter.elements(quantity, ours, theirs), where=where)
