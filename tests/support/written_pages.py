"""The pages that are made from the code: docs/metrics.md and docs/costs.md.

python -m tests.support.written_pages        # writes both; a test says when they are old
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from learner.planning.fit import RunPlan, plan_run
from learner.planning.hardware import on_gpus
from learner.planning.memory import GIB
from learner.planning.shapes import model_shape
from learner.settings.run import load_config
from services.dashboard.metric_reference import METRICS, Group

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- written by python -m tests.support.written_pages -->", "<!-- end of what is written -->"
PROMPT = 256
"""Tokens of the longest prompt, which can't be counted without the data."""
LARGE = ("A100-40G", "L40S", "A100", "H100", "H200")
SMALL = ("3090", "4090", "L4", "A10", "L40S")
ONE = ("learner.ranks=1", "rollout.actors=1")
NF4 = "model.quantization=nf4"
TWICE = "learner.activation_checkpointing=true"


class Case(NamedTuple):
    """A run to plan: what it is, its arguments, on how many GPUs."""

    what: str
    arguments: tuple[str, ...]
    gpus: int


ON_LARGE = (
    Case("LLaDA-8B on GSM8K, as published", ("recipe=llada_gsm8k",), 8),
    Case("the same, activations computed twice", ("recipe=llada_gsm8k", TWICE), 8),
    Case("the same on one GPU", ("recipe=llada_gsm8k", *ONE), 1),
    Case("the same on eight, 4-bit base", ("recipe=llada_gsm8k", NF4), 8),
    Case("LLaDA-8B on MATH", ("recipe=llada_math",), 8),
    Case("LLaDA-8B on Countdown", ("recipe=llada_countdown",), 8),
    Case("LLaDA-8B on Sudoku", ("recipe=llada_sudoku",), 8),
    Case("Dream-7B on GSM8K", ("recipe=dream_gsm8k",), 8),
)
ON_SMALL = (
    Case("LLaDA-8B on GSM8K, small, 4-bit base", ("recipe=llada_gsm8k_24gb",), 1),
    Case("LLaDA-8B on Countdown, 4-bit base", ("recipe=llada_countdown", NF4, TWICE), 8),
)

GROUPS: dict[Group, str] = {
    "learning": "Learning",
    "policy health": "Policy health",
    "throughput": "Throughput",
    "internals": "Internals",
}


def metric_tables() -> str:
    """Of each group a table of its metrics, in the order of the code's table."""
    parts = []
    for group, title in GROUPS.items():
        rows = [
            f"| `{metric.name}` | {metric.what}{f' [{metric.unit}]' if metric.unit else ''} | {metric.healthy} "
            f"| {metric.act} |"
            for metric in METRICS
            if metric.group == group
        ]
        head = ["| metric | what it is [unit] | healthy | otherwise |", "|---|---|---|---|"]
        parts.append("\n".join([f"## {title}", "", *head, *rows]))
    return "\n\n".join(parts)


def cost_tables() -> str:
    return "\n\n".join([_cost_table(ON_LARGE, LARGE), _cost_table(ON_SMALL, SMALL)])


def _cost_table(cases: Sequence[Case], models: Sequence[str]) -> str:
    head = ["run", "settings", "iterations", "GPUs", "a rank, an actor", *models]
    rows = [head, ["---"] * len(head), *(cost_row(case, models) for case in cases)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cost_row(case: Case, models: Sequence[str]) -> list[str]:
    config = load_config(list(case.arguments))
    shape = model_shape(config)
    plans = [
        plan_run(config, shape, on_gpus(case.gpus, None, model), prompt=PROMPT, prompt_source="given")
        for model in models
    ]
    memory = f"{plans[0].rank.peak / GIB:.0f}, {plans[0].actor.peak / GIB:.0f} GiB"
    settings = f"`{' '.join(case.arguments)}`"
    return [case.what, settings, f"{config.run.iterations:,}", str(case.gpus), memory, *map(_cell, plans)]


def _cell(plan: RunPlan) -> str:
    """Hours of the run; or that it doesn't fit, and the first thing to change."""
    if plan.fits:
        return f"{plan.time.run / 3600:,.0f} h"
    if not plan.problems:
        return "too slow for its time limits"
    return f"no; `{' '.join(plan.changes[0].settings)}`" if plan.changes else "no"


def with_part(page: str, part: str) -> str:
    """The page with another part between the marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{part}\n\n{END}{after}"


def pages() -> dict[Path, str]:
    """What each page should hold now."""
    parts = {"metrics.md": metric_tables(), "costs.md": cost_tables()}
    return {DOCS / name: with_part((DOCS / name).read_text(encoding="utf-8"), part) for name, part in parts.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
