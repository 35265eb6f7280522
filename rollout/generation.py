"""Writes what ``rollout.generate`` is asked for, and shows it: as it is unmasked, or as JSON."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rewards.errors import ConfigError
from rewards.infill import Infill
from rewards.task import Grade, Problem
from rollout.adapters import digest
from rollout.engines.torch import TorchEngine
from rollout.models.encoding import EncodedPrompt, completion_texts, encode
from rollout.models.family import policy_adapter
from rollout.models.lora import spec_of_adapter
from rollout.seeds import derive_seed
from rollout.spans import places, positions_needed
from rollout.subject import Subject, changed, held_out_problem, read_subject
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from rollout.unmasking import Unmasking, printable

_SAMPLER_OPTIONS = (
    *("completion_length", "block_length", "steps", "position_rule", "threshold", "temperature", "top_k", "top_p"),
)


def generate(options: argparse.Namespace, asked: Sequence[dict[str, str]] | Infill | None) -> int:
    """Write, show and, where it is a problem, grade.

    Args:
        options: ``rollout.generate``'s.
        asked: None where the run's problem or a raw text is the prompt.

    Raises:
        UnmaskError: whatever ends it.
    """
    subject = read_subject(options.run, options.adapter, options.model)
    changes = {name: getattr(options, name) for name in _SAMPLER_OPTIONS}
    sampler = subject.sampler if options.infill else changed(subject.sampler, changes)
    task, problem = None, Problem("prompt", {})
    if options.problem is not None:
        assert subject.config is not None, "the command refuses it without a run"
        task, problem = held_out_problem(subject.config, options.problem)
        asked = task.prompt(problem.fields)
    engine = _engine(subject, options.device, max_rows=options.samples)
    tokenizer: PreTrainedTokenizerBase = engine.tokenizer
    prompt = EncodedPrompt(tokenizer.encode(options.raw)) if asked is None else encode(tokenizer, asked)
    if options.infill:
        sampler = changed(sampler, {**changes, **_for_gaps(prompt, options)})
    _check_length(prompt, sampler, engine.family.max_length)
    if not options.json:
        _tell(subject, sampler, engine)
    view = None if options.json else _view(tokenizer, prompt, sampler, options)
    spec = GroupSpec(0, problem, options.samples, options.seed)
    if view is None:
        (group,) = engine.generate([spec], [prompt.ids], sampler, gaps=[prompt.gaps])
    else:
        with view:
            (group,) = engine.generate([spec], [prompt.ids], sampler, gaps=[prompt.gaps], on_step=view.step)
            view.finished(group.completion_ids)
    texts = completion_texts(tokenizer, group)
    if view is not None:
        view.print_texts(texts)  # before they are graded, at which a judge may fail
    grades = [] if task is None else [task.grade(problem.fields, text) for text in texts]
    if view is None:
        print(json.dumps(_as_json(subject, options.seed, tokenizer, group, texts, grades), indent=2))
        return 0
    for row in range(group.size):
        which = f"{row + 1}: " if group.size > 1 else ""
        logp, drawn = float(group.logp[row].sum()), int(group.drawn[row].sum())
        _say(f"{which}{group.nfe[row]} steps, {drawn} tokens, log-probability {logp:.3f}")
        if grades:
            _say(f"{which}{_verdict(grades[row])}")
    return 0


def _engine(subject: Subject, device: str, *, max_rows: int) -> TorchEngine:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here; leave it out, or take cpu")
    adapter = subject.adapter
    lora = None
    if adapter is not None:
        lora = spec_of_adapter(adapter.state, adapter.peft_config, policy_adapter(subject.model), adapter.folder)
    engine = TorchEngine(
        model_path=subject.model,
        lora=lora,
        max_rows=max_rows,
        device=device,
        dtype=subject.dtype or ("bfloat16" if device == "cuda" else "float32"),
        quantization=subject.quantization,
    )
    if adapter is not None:
        engine.load_adapter(0, adapter.state, digest(adapter.state))
    return engine


def _view(
    tokenizer: PreTrainedTokenizerBase, prompt: EncodedPrompt, sampler: SamplerSpec, options: argparse.Namespace
) -> Unmasking:
    if not prompt.gaps:
        return Unmasking(tokenizer, options.samples, sampler)
    keys = [derive_seed(options.seed, row) for row in range(options.samples)]
    at = [places(prompt.gaps, sampler.block_length, sampler.completion_length, key) for key in keys]
    return Unmasking(tokenizer, options.samples, sampler, places=at, prompt=prompt.ids)


def _for_gaps(prompt: EncodedPrompt, options: argparse.Namespace) -> dict[str, int]:
    """As many positions, in one block, as the gaps have tokens, one a step: where the command doesn't say otherwise."""
    C, block = options.completion_length, options.block_length
    if C is None:
        C = sum(max(gap.lengths) for gap in prompt.gaps)
        if block is not None:
            needed = C if block >= C else positions_needed(prompt.gaps, block, C)
            C = -(-needed // block) * block
    return {"completion_length": C, "block_length": block or C, "steps": options.steps or C}


def _check_length(prompt: EncodedPrompt, sampler: SamplerSpec, longest: int | None) -> None:
    tokens, C = len(prompt.ids), sampler.completion_length
    if not tokens:
        raise ConfigError("the prompt has no token; say something")
    if prompt.gaps and (needed := positions_needed(prompt.gaps, sampler.block_length, C)) > C:
        raise ConfigError(f"the gaps take {needed} positions; raise --completion-length {C}")
    if longest is not None and tokens + C > longest:
        raise ConfigError(
            f"the prompt has {tokens} tokens, which with --completion-length {C} is more than the {longest} positions "
            "of the model; shorten one of them"
        )


def _tell(subject: Subject, sampler: SamplerSpec, engine: TorchEngine) -> None:
    _say(f"base {subject.model} ({engine.describe()['dtype']}, {engine.device})")
    if subject.adapter is not None:
        _say(f"adapter {subject.adapter.folder} ({engine.adapter_digest[:12]})")
    how = f"at temperature {sampler.temperature:g}" if sampler.temperature else "greedily"
    order = f"{sampler.steps} steps, {sampler.position_rule}"
    if isinstance(sampler.threshold, tuple):
        order = f"all above one of the probabilities {', '.join(f'{p:g}' for p in sampler.threshold)} in a step"
    elif sampler.threshold is not None:
        order = f"all above probability {sampler.threshold:g} in a step"
    _say(f"{sampler.completion_length} tokens {how}: {order}")


def _verdict(grade: Grade) -> str:
    components = ", ".join(f"{name} {value:g}" for name, value in grade.components.items())
    why = f": {printable(grade.error)}" if grade.error else ""
    return f"{'right' if grade.correct else 'wrong'}{why}; reward {grade.reward:g} ({components})"


def _say(text: str) -> None:
    """Beside the completions."""
    print(text, file=sys.stderr, flush=True)


def _as_json(
    subject: Subject,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    group: TrajectoryGroup,
    texts: Sequence[str],
    grades: Sequence[Grade],
) -> dict[str, Any]:
    adapter = subject.adapter
    prompt = group.prompt_ids.tolist()
    completions = [_completion(tokenizer, group, row, text) for row, text in enumerate(texts)]
    for completion, grade in zip(completions, grades, strict=bool(grades)):
        completion["grade"] = {"correct": grade.correct, "components": grade.components, "error": grade.error}
    return {
        "model": subject.model,
        "adapter": None if adapter is None else {"folder": str(adapter.folder), "digest": group.adapter_digest},
        "sampler": dataclasses.asdict(group.sampler),
        "seed": seed,
        "prompt": {"text": tokenizer.decode(prompt), "ids": prompt},
        "completions": completions,
    }


def _completion(tokenizer: PreTrainedTokenizerBase, group: TrajectoryGroup, row: int, text: str) -> dict[str, Any]:
    tokens = []
    for place in np.flatnonzero(group.there[row]).tolist():
        token = int(group.completion_ids[row, place])
        drawn = bool(group.drawn[row, place])
        tokens.append(
            {
                "id": token,
                "text": tokenizer.decode([token]),
                "step": int(group.unmask_step[row, place]) + 1 if drawn else None,
                "logp": float(group.logp[row, place]) if drawn else None,
            }
        )
    return {"text": text, "logp": float(group.logp[row].sum()), "steps": int(group.nfe[row]), "tokens": tokens}
