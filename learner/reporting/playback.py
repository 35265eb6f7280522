"""What a run keeps so that its completions can be played back: how they were written, and what learning made of them.

A sample is one completion as safetensors. Beside the arrays of ``learner.reporting.samples`` it holds

    special          [C] bool, the token is a special one
    view_update      [v] int16, view_step [v] int16, view_count [v] int32, view_weight [v] float64:
                     the views in which each update scored this completion; step is -1 where a mask was drawn for the
                     update, which is no state of the rollout; weights have any sign
    view_choice_logp [v] float32, the new log-prob of the choice of positions; NaN where it is no action
    new_view         [q] int32, new_position [q] int32, new_logp [q] float32:
                     the tokens of those views, with their log-probs under the weights that the update started from
    order_counts     [p, s] uint16 or uint32, in an iteration's first sample only: how often a position was drawn at a
                     step, over all completions of the iteration, in at most ``ORDER_BINS`` bins of equal width
    order_mean_step  [C] float32, the mean step at which a position was drawn; NaN where none was

and in the header's metadata, under ``playback``, a JSON object: version, tokens (the text of each token by itself),
with the order, its completions and bin widths, where states were branched, branches (see ``branches_of``), and where
the prompt has gaps, context (see ``context_of``). Beside
the trajectory, in the row's ``data``, is what people look at first: question, expected and layout as the task gives
them, largest (its rewards' largest values), and scales (``scales_of``). Shapes: C positions (in a sample, those that
the completion has), v views, q scored tokens.
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from learner.ranks.scored import ScoredView, recorded_groups
from learner.reporting.reporter import Reporter
from rewards.infill import GAP
from rewards.task import Problem, Task
from rollout.models.encoding import completion_text, context_texts
from rollout.trajectory import DIVERSITY, TrajectoryGroup

VERSION = 1
ORDER_BINS = (256, 128)
"""Most bins of positions and of steps."""
MAX_QUESTION = 20_000
"""Characters of a question."""
MAX_CELLS = 1000
"""Of a layout."""


class PlaybackRecorder:
    """Hands samples to the reporter.

    Args:
        completions: kept per iteration at least, in whole groups; 0 keeps none.
        task: says what its problems and answers look like.
        train, held_out: the problems that iterations and evaluations are of.
    """

    def __init__(
        self,
        reporter: Reporter,
        tokenizer: PreTrainedTokenizerBase,
        *,
        completions: int,
        task: Task,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
    ) -> None:
        self._reporter, self._tokenizer, self._completions = reporter, tokenizer, completions
        self._task = task
        self._special = frozenset(tokenizer.all_special_ids)
        self._train, self._held_out = ({each.id: each.fields for each in split} for split in (train, held_out))
        self._texts: dict[int, str] = {}  # of single tokens

    def iteration(
        self,
        iteration: int,
        groups: Sequence[TrajectoryGroup],
        credit: Sequence[np.ndarray],
        updates: Sequence[Sequence[ScoredView]],
    ) -> None:
        """Keep whole groups of an iteration.

        Args:
            groups: all of the iteration's, as its updates saw them.
            credit: [group], what each completion was credited with, as ``Objective.credit`` gives it.
            updates: what each update on them scored of the recorded groups.
        """
        order: dict[str, Any] = {}
        order_arrays: dict[str, np.ndarray] = {}
        kept = recorded_groups(credit, self._completions)
        scales: dict[str, float] = {}
        if kept:
            order, order_arrays = order_map(groups)
            scales = scales_of(groups, updates)
        views_of: defaultdict[tuple[int, int], list[tuple[int, ScoredView]]] = defaultdict(list)
        for update, scored in enumerate(updates):
            for view in scored:
                views_of[view.group, view.row].append((update, view))
        for index in kept:
            group = groups[index]
            for row in range(group.size):
                views = views_of[index, row]
                about = {
                    "advantage": float(np.ravel(credit[index][row])[0]),
                    "group_size": group.size,
                    "updates": len(updates),
                    "learner_version": iteration - 1,
                    "scales": scales,
                }
                fields = self._train[group.problem_id]
                arrays = view_arrays(views) | order_arrays
                number_C = (np.cumsum(group.there[row]) - 1).astype(np.int32)  # a sample has no other positions
                arrays["new_position"] = number_C[arrays["new_position"]]
                self._sample(iteration, group, row, "train", fields, about, arrays, order)
                order, order_arrays = {}, {}

    def evaluation(self, iteration: int, kind: str, groups: Sequence[TrajectoryGroup]) -> None:
        """Keep the completions of an evaluation; ``kind`` is base or trained."""
        scales = scales_of(groups, ())
        for group in groups:
            for row in range(group.size):
                fields, about = self._held_out[group.problem_id], {"group_size": group.size, "scales": scales}
                self._sample(iteration, group, row, kind, fields, about, {}, {})

    def prompt(self, group: TrajectoryGroup) -> str:
        """As the model got it, an ellipsis in the place of a gap."""
        if group.places is None:
            return str(self._tokenizer.decode(group.prompt_ids.tolist()))
        context = context_of(group, 0, self._tokenizer)
        last = int(group.there[0].sum())
        gaps = [bool(context[0]["before"]), *([True] * (len(context) - 1)), context[-1]["before"] < last]
        shown = [f" {GAP} " if gap else "" for gap in gaps]
        return "".join(f"{before}{piece['text']}" for before, piece in zip(shown, context, strict=False)) + shown[-1]

    def text(self, group: TrajectoryGroup, row: int) -> str:
        return completion_text(self._tokenizer, group.completion_ids[row].tolist(), group.place(row))

    def _sample(
        self,
        iteration: int,
        group: TrajectoryGroup,
        row: int,
        kind: str,
        fields: Mapping[str, Any],
        about: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        order: Mapping[str, Any],
    ) -> None:
        ids, completion = group.completion_ids[row, group.there[row]].tolist(), self.text(group, row)
        shown: dict[str, Any] = {}
        self._reporter.attempt("playback", self._show, shown, fields, completion, bool(group.correct[row]))
        special = np.array([token in self._special for token in ids], dtype=np.bool_)
        branches = branches_of(group, row, self._tokenizer)
        playback = {"version": VERSION, "tokens": [self._token(token) for token in ids], **order}
        if branches:
            playback["branches"] = branches
        if group.places is not None:
            playback["context"] = context_of(group, row, self._tokenizer)
        self._reporter.sample(
            iteration,
            group,
            row,
            self.prompt(group),
            completion,
            kind=kind,
            fields=fields,
            data={**about, **shown},
            arrays={"special": special, **arrays},
            metadata={"playback": json.dumps(playback)},
            branches=branches,
        )

    def _show(self, shown: dict[str, Any], fields: Mapping[str, Any], completion: str, correct: bool) -> None:
        """Put into ``shown`` what the task, which may be a user's own, says about a problem and an answer."""
        questions = [each["content"] for each in self._task.messages(dict(fields)) if each["role"] == "user"]
        shown["question"] = questions[-1][:MAX_QUESTION] if questions else None
        shown["expected"] = self._task.expected(dict(fields))
        shown["largest"] = dict(self._task.largest)
        layout = self._task.layout(dict(fields), completion, correct=correct)
        if layout is not None and len(layout.cells) <= MAX_CELLS:
            shown["layout"] = layout.as_json()

    def _token(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return self._texts[token]


def branches_of(group: TrajectoryGroup, row: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """What became of a completion's branched states: for each fill the step before which the state was, the text, the
    verdict, the rewards by part, and of a drawn fill its log-prob."""
    if group.branch_step is None or group.branch_ids is None:
        return []
    assert group.branch_rewards is not None and group.branch_correct is not None
    found = []
    for s, z in np.ndindex(group.branch_correct.shape[1:]):
        if (step := int(group.branch_step[row, s])) < 0:
            continue
        rewards = dict(zip(group.reward_names, group.branch_rewards[row, s, z].tolist(), strict=True))
        rewards.pop(DIVERSITY, None)  # of completions alone
        branch = {
            "step": step,
            "completion": completion_text(tokenizer, group.branch_ids[row, s, z].tolist(), group.place(row)),
            "correct": bool(group.branch_correct[row, s, z]),
            "rewards": rewards,
        }
        if group.branch_logp is not None:
            branch["logp"] = float(group.branch_logp[row, s, z].sum(dtype=np.float64))
        found.append(branch)
    return found


def context_of(group: TrajectoryGroup, row: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The prompt's text between the gaps that a completion fills, in reading order: ``text``, and ``before``, how many
    of the completion's tokens stand before it."""
    place_C = group.place(row)
    assert place_C is not None, "a prompt without gaps"
    found = context_texts(tokenizer, group.prompt_ids, place_C)
    return [{"before": before, "text": text} for before, text in found]


def view_arrays(views: Sequence[tuple[int, ScoredView]]) -> dict[str, np.ndarray]:
    """(update, view) pairs as the arrays of a sample, by update, then by step, then by what was scored; the order that
    they come in, which is that of ranks and forwards, doesn't matter."""
    views = sorted(views, key=_order)
    sizes = [view.positions.size for _, view in views]
    return {
        "view_update": np.array([update for update, _ in views], dtype=np.int16),
        "view_step": np.array([view.step for _, view in views], dtype=np.int16),
        "view_count": np.array([view.draws for _, view in views], dtype=np.int32),
        "view_weight": np.array([view.weight for _, view in views], dtype=np.float64),
        "view_choice_logp": np.array([view.choice_logp for _, view in views], dtype=np.float32),
        "new_view": np.repeat(np.arange(len(views), dtype=np.int32), sizes),
        "new_position": np.concatenate([np.zeros(0, np.int32), *(view.positions for _, view in views)]),
        "new_logp": np.concatenate([np.zeros(0, np.float32), *(view.logp for _, view in views)]),
    }


def _order(pair: tuple[int, ScoredView]) -> tuple[Any, ...]:
    update, view = pair
    return update, view.step, view.positions.tolist(), view.weight, view.logp.tolist()


def scales_of(groups: Sequence[TrajectoryGroup], updates: Sequence[Sequence[ScoredView]]) -> dict[str, float]:
    """What a page draws all completions of a batch by: the largest mean entropy of a step (nats), and of what the
    updates scored the largest absolute weight, and log ratio of a view that the rollout went through."""
    entropy = 0.0
    for group in groups:
        rows, positions = np.nonzero(group.drawn)
        slots = rows * group.sampler.most_steps + group.unmask_step[rows, positions]
        sums = np.bincount(slots, weights=group.entropy[rows, positions])
        entropy = max(entropy, float((sums / np.maximum(np.bincount(slots), 1)).max(initial=0.0)))
    views = [view for scored in updates for view in scored]
    ratios = [
        float((view.logp - groups[view.group].logp[view.row, view.positions]).sum(dtype=np.float64))
        for view in views
        if view.step >= 0
    ]
    return {
        "entropy": entropy,
        "weight": max((abs(view.weight) for view in views if math.isfinite(view.weight)), default=0.0),
        "log_ratio": max((abs(ratio) for ratio in ratios if math.isfinite(ratio)), default=0.0),
    }


def order_map(groups: Sequence[TrajectoryGroup]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """When each position is drawn, over all completions: what goes into a sample's JSON, and its arrays."""
    sampler = groups[0].sampler
    C, m = sampler.completion_length, sampler.most_steps
    per_bin = (-(-C // ORDER_BINS[0]), -(-m // ORDER_BINS[1]))
    counts = np.zeros((-(-C // per_bin[0]), -(-m // per_bin[1])), dtype=np.uint32)
    steps_C, drawn_C = np.zeros(C, dtype=np.float64), np.zeros(C, dtype=np.int64)
    for group in groups:
        rows, positions = np.nonzero(group.drawn)
        steps = group.unmask_step[rows, positions].astype(np.int64)
        np.add.at(counts, (positions // per_bin[0], steps // per_bin[1]), 1)
        np.add.at(steps_C, positions, steps)
        np.add.at(drawn_C, positions, 1)
    mean_C = np.where(drawn_C > 0, steps_C / np.maximum(drawn_C, 1), np.nan).astype(np.float32)
    if counts.max(initial=0) < 2**16:
        counts = counts.astype(np.uint16)
    about = {
        "completions": sum(group.size for group in groups),
        "positions": C,
        "steps": m,
        "positions_per_bin": per_bin[0],
        "steps_per_bin": per_bin[1],
    }
    return {"order": about}, {"order_counts": counts, "order_mean_step": mean_C}
