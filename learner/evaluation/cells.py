"""The grid of an evaluation: each cell is one way to decode all problems."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from learner.evaluation.settings import EvaluateConfig
from rollout.trajectory import SamplerSpec

Decoding = Literal["greedy", "threshold", "sampled"]


@dataclass(frozen=True)
class Cell:
    """One way to decode, with ``samples`` completions per problem."""

    decoding: Decoding
    sampler: SamplerSpec
    samples: int = 1

    @property
    def key(self) -> str:
        """Names the cell in a results file; another setting of the sampler is another key."""
        about = json.dumps([dataclasses.asdict(self.sampler), self.samples], sort_keys=True)
        return f"{self.label} {hashlib.sha256(about.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        """For people."""
        sampler = self.sampler
        if self.decoding == "threshold":
            return f"threshold {sampler.threshold:g}"
        how = "greedy" if self.decoding == "greedy" else f"sampled x{self.samples}"
        return f"{how} {sampler.position_rule} {sampler.steps} steps"

    def describe(self) -> dict[str, Any]:
        """JSON-able description; steps and position_rule are None where a threshold decides."""
        about: dict[str, Any] = {
            "label": self.label,
            "key": self.key,
            "decoding": self.decoding,
            "samples": self.samples,
        }
        about |= dataclasses.asdict(self.sampler)
        return about | ({"position_rule": None, "steps": None} if self.decoding == "threshold" else {})


def grid(config: EvaluateConfig) -> list[Cell]:
    """Greedy cells, then thresholds, then sampled ones; within each by order, then by descending step count."""
    base, decode = _sampler(config), config.decode
    rules = decode.position_rules or (config.evaluation.position_rule, config.rollout.sampler.position_rule)
    ordered = [(rule, steps) for rule in dict.fromkeys(rules) for steps in config.step_counts]
    cells = []
    if decode.greedy:
        cells += [Cell("greedy", base.greedy(steps=steps, position_rule=rule)) for rule, steps in ordered]
    for threshold in dict.fromkeys(decode.thresholds):
        greedy = base.greedy(steps=config.step_counts[0], position_rule="low_confidence")
        cells.append(Cell("threshold", dataclasses.replace(greedy, threshold=threshold)))
    if decode.samples:
        cells += [
            Cell("sampled", dataclasses.replace(base, steps=steps, position_rule=rule), decode.samples)
            for rule, steps in ordered
        ]
    return cells


def _sampler(config: EvaluateConfig) -> SamplerSpec:
    """The training sampler with what the evaluation says otherwise."""
    decode = config.decode
    C, block = config.lengths
    changes: dict[str, Any] = {"completion_length": C, "block_length": block, "threshold": None}
    for name in ("position_temperature", "temperature", "top_k", "top_p"):
        if getattr(decode, name) is not None:
            changes[name] = getattr(decode, name)
    if changes.get("top_k") == 0:
        changes["top_k"] = None
    return dataclasses.replace(config.rollout.sampler.spec(), **changes)
