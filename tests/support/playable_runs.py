"""Runs whose samples can be played back, written by the run's own recorder: made-up completions of given texts."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from learner.objectives.advantages import group_advantages
from learner.ranks.scored import ScoredView, recorded_groups
from learner.reporting.playback import PlaybackRecorder
from learner.reporting.reporter import Reporter
from learner.runs.directory import RunDirectory
from rewards.task import Problem, Task, get_task
from rollout.trajectory import SamplerSpec, TrajectoryGroup
from services.store.writer import StoreWriter

EOS = "<|endoftext|>"

Scored = Literal["steps", "masks", "branches", "nothing"]

PUZZLE_TEXT, SOLUTION = "0321003004002100", "4321123434122143"
PUZZLE = ["Puzzle: ", *PUZZLE_TEXT]
GRID = ["<answer>", *SOLUTION, "</answer>"]

STORY = (
    "Let me work through it step by step.\n\n1. A box holds 12 pencils, and Mia buys 7 boxes:\n   12 * 7 = 84 pencils."
    "\n"
    "2. She gives a third away, 84 / 3 = 28, so 84 - 28 = 56 are left.\n3. Each of her 4 friends then gets as many as "
    "the others:\n\n   56 / 4 = 14\n\nCheck: 4 * 14 + 28 = 84, which is what she bought.\n\n<answer>14</answer>"
)

WORDS = {"question": "Mia buys 7 boxes of 12 pencils. How many does each friend get?", "answer": "14"}

ODD = [
    "<script>alert(1)</script>",
    "<b>",
    "&amp;",
    "\n",
    " \t",
    "\0",
    "\x1b[31m",
    "\u202e",
    "\u200b",
    "👩‍🔬",
    "�",
    "",
    "   ",
    "שלום",
    "مرحبا",
    "漢字",
    "x" * 300,
    "'; DROP TABLE runs; --",
    "../../etc/passwd",
]


def tokenizer_of(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are exactly these, in order, behind its special ones."""
    special = [EOS, "<|mdm_mask|>", "<|unk|>"]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        mask_token="<|mdm_mask|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
    )


def pieces(text: str) -> list[str]:
    """Words with the space before them, numbers by their digits, marks and line breaks by themselves."""
    found: list[str] = []
    for character in text:
        joins = found and character.isalpha() and (found[-1] == " " or found[-1][-1].isalpha())
        if joins:
            found[-1] += character
        else:
            found.append(character)
    return found


def written(
    tokenizer: PreTrainedTokenizerFast,
    group_id: int,
    words: Sequence[Sequence[str]],
    *,
    length: int,
    block: int,
    steps: int,
    prompt: Sequence[str] = (),
    greedy: bool = False,
    problem_id: str = "",
) -> TrajectoryGroup:
    """A group of completions of these words, filled up with the end of the text: sure tokens are written first."""
    G, per_block = len(words), steps // (length // block)
    draw = np.random.default_rng([group_id, length, G])
    ids = np.zeros((G, length), np.int32)
    for row, own in enumerate(words):
        ids[row, : len(own)] = [tokenizer.convert_tokens_to_ids(word) for word in own]
    hardness = draw.gamma(0.6, 0.7, (G, length)) * np.where(ids == 0, 0.15, 1.0)
    order = np.zeros((G, length), np.int64)
    for start in range(0, length, block):
        in_block = slice(start, start + block)
        noisy = hardness[:, in_block] + draw.gumbel(0, 0.25, (G, block))
        order[:, in_block] = noisy.argsort(axis=1).argsort(axis=1)
    revealed = block // per_block
    unmask_step = (order // revealed + np.arange(length) // block * per_block).astype(np.int16)
    entropy = np.minimum(hardness, 4.0).astype(np.float32)
    # Fillers: whole blocks of ends behind the first such block.
    drawn = np.ones((G, length), bool)
    for row in range(G):
        ends = [b for b in range(length // block) if not ids[row, b * block : (b + 1) * block].any()]
        if ends and ends[0] + 1 < length // block:
            at = (ends[0] + 1) * block
            drawn[row, at:], unmask_step[row, at:] = False, (ends[0] + 1) * per_block
    logp = -np.minimum(hardness * draw.random((G, length)), 6.0)
    solved = draw.random(G) < 0.5 if G > 1 else np.array([draw.random() < 0.6])
    cells = np.where(solved, 2.0, 2.0 * draw.random(G))
    rewards = np.stack([np.full(G, 0.25), np.where(draw.random(G) < 0.8, 0.5, -0.25), cells], 1).astype(np.float32)
    group = TrajectoryGroup(
        group_id=group_id,
        problem_id=problem_id or f"made-up-{group_id}",
        prompt_ids=np.array([tokenizer.convert_tokens_to_ids(word) for word in prompt] or [2], np.int32),
        completion_ids=ids,
        unmask_step=unmask_step,
        unmask_rank=(order % revealed).astype(np.int16),
        drawn=drawn,
        logp=np.where(drawn, logp, 0).astype(np.float32),
        logp_raw=np.where(drawn, 1.3 * logp, 0).astype(np.float32),
        entropy=np.where(drawn, entropy, 0).astype(np.float32),
        support_indptr=None,
        support_ids=None,
        rewards=rewards,
        reward_names=("length", "clues", "cells"),
        correct=solved,
        policy_version=-1 if greedy else 3,
        adapter_digest="" if greedy else "5f" * 32,
        sampler=SamplerSpec(length, block, steps, "entropy", 0.0 if greedy else 0.6),
        seed=2**62 + group_id,
        nfe=np.full(G, steps, np.int32),
        actor_id="rollout-0",
    )
    group.validate()
    return group


def branched(group: TrajectoryGroup) -> TrajectoryGroup:
    """With two fills, drawn at step 5, of every completion; the second has its tokens."""
    G, R = group.size, len(group.reward_names)
    ids = np.repeat(group.completion_ids[:, None, None], 2, axis=2)
    hidden_GC = group.unmask_step >= 5
    ids[:, 0, 0] = np.where(hidden_GC, group.completion_ids.max(), group.completion_ids)
    rewards = np.zeros((G, 1, 2, R), np.float32)
    rewards[:, 0, 1] = group.rewards
    correct = np.zeros((G, 1, 2), bool)
    correct[:, 0, 1] = group.correct
    found = dataclasses.replace(
        group,
        branch_step=np.full((G, 1), 5, np.int16),
        branch_ids=ids,
        branch_logp=np.where(np.broadcast_to(hidden_GC[:, None, None], ids.shape), -0.5, 0.0).astype(np.float32),
        branch_rewards=rewards,
        branch_correct=correct,
    )
    found.validate()
    return found


def scored_of(groups: Sequence[TrajectoryGroup], *, k: int, update: int, shift: float) -> list[ScoredView]:
    """k draws of steps for each recorded completion with an advantage; log-probs have moved by ``shift`` or so."""
    views = []
    for index in recorded_groups([group_advantages(group.rewards) for group in groups], groups[0].size):
        group = groups[index]
        draw = np.random.default_rng([group.group_id, update])
        for row in np.flatnonzero(group_advantages(group.rewards)):
            eligible = np.unique(group.unmask_step[row][group.drawn[row]])
            steps, counts = np.unique(draw.choice(eligible, k), return_counts=True)
            for step, count in zip(steps, counts, strict=True):
                at = np.flatnonzero((group.unmask_step[row] == step) & group.drawn[row]).astype(np.int32)
                logp = (group.logp[row, at] + shift * draw.normal(size=at.size)).astype(np.float32)
                weight = float(count * (0.3 + draw.gamma(2.0, 0.5)))
                views.append(ScoredView(index, int(row), int(step), int(count), weight, at, logp, math.nan))
    return views


def masks_of(groups: Sequence[TrajectoryGroup], *, update: int) -> list[ScoredView]:
    """For each recorded completion with an advantage the whole of it, and a drawn mask that is credited with less."""
    views = []
    for index in recorded_groups([group_advantages(group.rewards) for group in groups], groups[0].size):
        group = groups[index]
        draw = np.random.default_rng([group.group_id, update])
        C = group.completion_ids.shape[1]
        for row in np.flatnonzero(group_advantages(group.rewards)):
            for at, weight in ((np.arange(C), 0.5), (np.flatnonzero(draw.random(C) < 0.4), -0.25)):
                logp = -draw.random(at.size).astype(np.float32)
                views.append(ScoredView(index, int(row), -1, 1, weight, at.astype(np.int32), logp, math.nan))
    return views


def write_playable(runs: Path, name: str, *, long: bool = False, iterations: int = 3, scored: Scored = "steps") -> None:
    """A finished run, see ``playable``."""
    with playable(runs, name, long=long, iterations=iterations, scored=scored) as iterate:
        for iteration in range(1, iterations + 1):
            iterate(iteration)


@contextlib.contextmanager
def playable(
    runs: Path, name: str, *, long: bool = False, iterations: int, scored: Scored = "steps"
) -> Iterator[Callable[[int], None]]:
    """A run that does the iterations that it is called with, and has finished at the end of the block.

    Sudoku in 8 steps, or (``long``) word problems in 128 steps over 384 positions; groups of 8, two updates a batch,
    base and trained on two held-out problems; the last group of iteration ``iterations`` has odd tokens. ``scored``:
    what the updates score of a completion.
    """
    story = [*pieces(STORY)]
    wrong = [*pieces(STORY.replace("14", "16").replace("Check: ", "So "))]
    text, other = (story, wrong) if long else (GRID, [*GRID[:9], *"3421", *GRID[13:]])
    tokenizer = tokenizer_of([*story, *wrong, *GRID, *PUZZLE, *ODD])
    shape = {"length": 384, "block": 12, "steps": 128} if long else {"length": 24, "block": 24, "steps": 8}
    prompt = pieces(WORDS["question"]) if long else PUZZLE
    prompt = [word for word in prompt if word in tokenizer.get_vocab()]
    task = get_task("gsm8k" if long else "sudoku")
    fields = WORDS if long else {"puzzle": PUZZLE_TEXT, "solution": SOLUTION}
    problems = [Problem(f"made-up-{number}", fields) for number in range(10 * iterations + 10)]
    with recording(runs, name, tokenizer, task, problems, iterations=iterations) as (reporter, recorder):

        def evaluation(iteration: int, kind: str) -> None:
            held_out = [
                written(tokenizer, n, [text if iteration or n else other], **shape, prompt=prompt, greedy=True)
                for n in range(2)
            ]
            recorder.evaluation(iteration, kind, held_out)

        def iterate(iteration: int) -> None:
            words = [text if row % 3 else other for row in range(8)]
            if iteration == iterations and not long:
                words[7] = ODD
            groups = [
                written(tokenizer, 10 * iteration + g, words, **shape, prompt=prompt) for g in range(4 if long else 6)
            ]
            k = 24 if long else 4
            views = {
                "steps": lambda u: scored_of(groups, k=k, update=u, shift=(1e-7, 0.05)[u]),
                "masks": lambda u: masks_of(groups, update=u),
                "branches": lambda u: [],
                "nothing": lambda u: [],
            }[scored]
            if scored == "branches":
                groups = [branched(group) for group in groups]
            updates = [views(u) for u in range(2)]
            reporter.iteration(iteration, {"reward/mean": 1.0 + 0.1 * iteration, "loss": 0.1, "solve_rate": 0.4})
            recorder.iteration(iteration, groups, [group_advantages(group.rewards) for group in groups], updates)

        evaluation(0, "base")
        yield iterate
        evaluation(iterations, "trained")


@contextlib.contextmanager
def recording(
    runs: Path,
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    task: Task,
    problems: Sequence[Problem],
    *,
    iterations: int,
) -> Iterator[tuple[Reporter, PlaybackRecorder]]:
    """The reporter of a run on these problems, and its recorder of samples; it has finished at the end of the block."""
    with RunDirectory.create(runs, name) as run_dir:
        about = {"task": task.name, "objective": "agrpo", "total_iterations": iterations}
        reporter = Reporter(
            run_dir, StoreWriter(run_dir.store_url, name, **about), total_iterations=iterations, quiet=True
        )
        yield (
            reporter,
            PlaybackRecorder(reporter, tokenizer, completions=8, task=task, train=problems, held_out=problems),
        )
        reporter.store.status("finished", {})
        assert reporter.flush(60)
        reporter.close()


def filled(
    tokenizer: PreTrainedTokenizerFast, around: Sequence[Sequence[str]], rows: Sequence[Sequence[Sequence[str]]]
) -> TrajectoryGroup:
    """A group whose completions fill the gaps between these tokens, a token a step; of each what it has in each gap."""
    words = [[word for gap in gaps for word in gap] for gaps in rows]
    length = max(map(len, words))
    prompt = [word for piece in around for word in piece]
    group = written(tokenizer, 0, words, length=length, block=length, steps=length, prompt=prompt)
    places = np.full(group.completion_ids.shape, -1, np.int32)
    for row, gaps in enumerate(rows):
        at, found = 0, []
        for piece, gap in zip(around, gaps, strict=False):
            found += range(at + len(piece), at + len(piece) + len(gap))
            at += len(piece) + len(gap)
        places[row, : len(found)] = found
    there, step = places >= 0, np.zeros_like(group.unmask_step)
    for row in range(group.size):  # steps without a token are none
        step[row, there[row]] = group.unmask_step[row, there[row]].argsort().argsort()
    kept = {name: np.where(there, getattr(group, name), np.float32(0)) for name in ("logp", "logp_raw", "entropy")}
    found_group = dataclasses.replace(
        group, places=places, unmask_step=np.where(there, step, np.int16(-1)), drawn=group.drawn & there, **kept
    )
    found_group.validate()
    return found_group


def write_gapped(
    runs: Path,
    name: str,
    task: Task,
    fields: dict[str, Any],
    around: Sequence[Sequence[str]],
    rows: Sequence[Sequence[Sequence[str]]],
) -> None:
    """A finished run of one iteration with one group, see ``filled``."""
    tokenizer = tokenizer_of([word for part in (*around, *(gap for gaps in rows for gap in gaps)) for word in part])
    group = filled(tokenizer, around, rows)
    problems = [Problem(group.problem_id, fields)]
    with recording(runs, name, tokenizer, task, problems, iterations=1) as (reporter, recorder):
        reporter.iteration(1, {"reward/mean": 1.0})
        credit = [group_advantages(group.rewards)]
        recorder.iteration(1, [group], credit, [scored_of([group], k=4, update=0, shift=0.05)])
