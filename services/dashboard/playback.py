"""The playback document: one sampled completion, how it was written, and what learning made of it.

Reads the safetensors bytes of a sample row with numpy alone (their layout is described in
``learner.reporting.playback``, which writes them, and in docs/dashboard-api.md). A sample may come from anybody's
store, so everything is checked before use.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from services.dashboard.models import Number, number
from services.dashboard.playback_models import (
    Branch,
    Cells,
    Context,
    Frame,
    OrderMap,
    Playback,
    SampleReference,
    ScoredToken,
    ScoredView,
)
from services.dashboard.shown import Owners, frame_layout, largest, layout_of, mark_of, question, scales, text_of
from services.store.schema import MAX_BLOB_BYTES

MAX_HEADER_BYTES = 8 * 2**20
MAX_POSITIONS = 2**16
MAX_STEPS = 2**15
MAX_SCORED = 2**18
LONGEST_FRAME = 400
"""Characters of a frame's completion."""


class UnreadableSample(Exception):
    """The sample isn't one that can be played back; the sentence says why."""


def playback(row: Mapping[str, Any]) -> Playback:
    """The document of a row of the table ``samples``, without siblings and counterparts.

    Raises:
        UnreadableSample: the trajectory is damaged, or not one of ours.
    """
    arrays, kept = _read(row["trajectory"])
    data = row["data"] if isinstance(row["data"], dict) else {}
    cells, steps, notes = _cells(arrays, kept)
    position_logp = _array(arrays, "position_logp", "f") if "position_logp" in arrays else None
    scored = _scored(arrays, cells, position_logp)
    if "view_step" not in arrays and row["kind"] == "train":
        notes.append("an older version recorded this sample: what the update scored is not known")
    sampler = data.get("sampler")
    sampler = _clean(sampler) if isinstance(sampler, dict) else {}
    advantage, updates = data.get("advantage"), data.get("updates")
    rewards = row["rewards"] if isinstance(row["rewards"], dict) else {}
    known = (
        *("policy_version", "adapter_digest", "actor_id", "seed", "nfe", "threshold"),
        *("learner_version", "group_size"),
    )
    about: dict[str, Any] = {name: row[name] for name in ("id", "run_id", "iteration", "group_id", "row", "correct")}
    about |= {name: _text(row[name]) for name in ("kind", "problem_id", "prompt", "completion")}
    layout = layout_of(data, about["completion"], Owners(cells, about["completion"]))
    cells.mark = mark_of(layout, len(cells.step))
    return Playback(
        **about,
        question=question(row),
        expected=text_of(data.get("expected")),
        layout=layout,
        largest=largest(data),
        scales=scales(data),
        time=_float(row["time"]),
        reward=None if row["reward"] is None else _float(row["reward"]),
        rewards={_text(str(name)): _float(value) for name, value in rewards.items()},
        advantage=_float(advantage) if isinstance(advantage, int | float | str) else None,
        steps=steps,
        cells=cells,
        context=_context(kept, len(cells.step)),
        position_logp=None if position_logp is None else position_logp[:MAX_STEPS].tolist(),
        updates=updates if isinstance(updates, int) else int(max((s.update for s in scored), default=-1)) + 1,
        scored=scored,
        branches=_branches(kept),
        sampler=sampler,
        provenance={name: _text(str(data[name])) for name in known if name in data},
        notes=notes,
    )


def order_map(row: Mapping[str, Any]) -> OrderMap | None:
    """The order map that a row of ``samples`` carries; None when it carries none. Raises UnreadableSample."""
    arrays, kept = _read(row["trajectory"])
    about, counts, mean = kept.get("order"), arrays.get("order_counts"), arrays.get("order_mean_step")
    if not isinstance(about, dict) or counts is None or mean is None:
        return None
    names = ("completions", "positions", "steps", "positions_per_bin", "steps_per_bin")
    numbers: dict[str, Any] = {name: about.get(name) for name in names}
    whole = all(isinstance(value, int) and 0 < value <= 2**31 for value in numbers.values())
    _require(whole and counts.ndim == 2 and counts.size <= 2**20, "its order map is no map")
    _require(counts.dtype.kind in "iu" and mean.dtype.kind == "f", "its order map has other numbers than counts")
    _require(mean.shape == (numbers["positions"],) and mean.size <= MAX_POSITIONS, "its order map has gaps")
    return OrderMap(
        iteration=row["iteration"],
        **numbers,
        counts=counts.tolist(),
        mean_step=[None if math.isnan(value) else value for value in mean.tolist()],
    )


def reference(row: Mapping[str, Any]) -> SampleReference:
    """A row of ``samples`` as one of the samples that another one points to."""
    return SampleReference(
        **{name: row[name] for name in ("id", "iteration", "group_id", "row", "correct")},
        kind=_text(row["kind"]),
        problem_id=_text(row["problem_id"]),
        reward=None if row["reward"] is None else _float(row["reward"]),
    )


def frame(row: Mapping[str, Any]) -> Frame:
    """A row of ``samples`` as a frame of the film of its problem."""
    data = row["data"] if isinstance(row["data"], dict) else {}
    completion = _text(row["completion"])
    layout = frame_layout(data, completion)
    return Frame(**reference(row).model_dump(), completion=completion[:LONGEST_FRAME], layout=layout)


def _read(data: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays, and the JSON object that the recorder put into the header (empty in samples of older versions). ``data``:
    as ``Reader.sample`` gives it."""
    _require(data is not None, f"it has more than {MAX_BLOB_BYTES >> 20} MiB")
    _require(isinstance(data, bytes), "its trajectory is no bytes")
    size = int.from_bytes(data[:8], "little")
    _require(size <= MAX_HEADER_BYTES, f"its header has more than {MAX_HEADER_BYTES >> 20} MiB")
    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + size])
        kept = json.loads((header.get("__metadata__") or {}).get("playback", "{}"))
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnreadableSample(f"its trajectory is damaged ({type(error).__name__})") from None
    _require(isinstance(kept, dict), "its header is not ours")
    return arrays, kept


def _cells(arrays: Mapping[str, np.ndarray], kept: Mapping[str, Any]) -> tuple[Cells, int, list[str]]:
    ids = _array(arrays, "completion_ids", "iu")
    C = ids.size
    _require(0 < C <= MAX_POSITIONS, f"it has {C} positions")
    step, drawn = _array(arrays, "unmask_step", "iu", (C,)), _array(arrays, "drawn", "b", (C,))
    _require(bool((step >= 0).all()) and int(step.max()) < MAX_STEPS, "it has impossible steps")
    rank = _array(arrays, "unmask_rank", "iu", (C,))
    laws = {name: _array(arrays, name, "f", (C,)) for name in ("logp", "logp_raw", "entropy")}
    notes = []
    tokens = kept.get("tokens")
    if tokens is None:
        tokens = [f"#{token}" for token in ids.tolist()]
        notes.append("an older version recorded this sample: tokens are shown by their numbers")
    _require(
        isinstance(tokens, list) and len(tokens) == C and all(isinstance(token, str) for token in tokens),
        "its token texts don't fit its tokens",
    )
    special = _array(arrays, "special", "b", (C,)) if "special" in arrays else np.zeros(C, dtype=bool)
    with np.errstate(over="ignore"):
        confidence = np.exp(laws["logp"].astype(np.float64))
    cells = Cells(
        text=[_text(token) for token in tokens],
        token=ids.tolist(),
        special=special.tolist(),
        step=step.tolist(),
        rank=rank.tolist(),
        drawn=drawn.tolist(),
        confidence=_where(drawn, confidence),
        logp=_where(drawn, laws["logp"]),
        logp_raw=_where(drawn, laws["logp_raw"]),
        entropy=_where(drawn, laws["entropy"]),
    )
    return cells, int(step[drawn].max() if drawn.any() else step.max()) + 1, notes


def _context(kept: Mapping[str, Any], positions: int) -> list[Context]:
    given = kept.get("context", [])
    _require(isinstance(given, list) and len(given) <= positions + 1, "the text around its gaps is no list")
    found: list[Context] = []
    for piece in given:
        before, text = (piece.get("before"), piece.get("text")) if isinstance(piece, dict) else (None, None)
        last = found[-1].before if found else 0
        if not (isinstance(before, int) and last <= before <= positions and isinstance(text, str)):
            raise UnreadableSample("the text around its gaps stands nowhere")
        found.append(Context(before=before, text=_text(text)))
    return found


def _scored(arrays: Mapping[str, np.ndarray], cells: Cells, choices: np.ndarray | None) -> list[ScoredView]:
    if "view_step" not in arrays:
        return []
    step = _array(arrays, "view_step", "iu")
    update, count = (_array(arrays, f"view_{name}", "iu", step.shape) for name in ("update", "count"))
    weight, chosen = (_array(arrays, f"view_{name}", "f", step.shape) for name in ("weight", "choice_logp"))
    of, position = _array(arrays, "new_view", "iu"), _array(arrays, "new_position", "iu")
    logp = _array(arrays, "new_logp", "f", of.shape)
    fits = position.shape == of.shape and _inside(of, step.size) and _inside(position, len(cells.step))
    drawn_or_step = bool(((step >= -1) & (step < MAX_STEPS)).all())  # -1: a drawn mask
    _require(fits and drawn_or_step, "its scored steps point nowhere")
    _require(step.size <= MAX_SCORED and of.size <= MAX_SCORED, f"it has more than {MAX_SCORED} scored tokens")
    by_view = np.argsort(of, kind="stable")
    ends = np.searchsorted(of[by_view], np.arange(step.size + 1))
    found = []
    for view in range(step.size):
        at = by_view[ends[view] : ends[view + 1]]
        was_state = step[view] >= 0
        tokens = [_token(cells, int(position[i]), float(logp[i]), recorded=was_state) for i in at]
        choice_old, choice_new = None, float(chosen[view])
        if choices is not None and 0 <= step[view] < choices.size and not math.isnan(choice_new):
            choice_old = float(choices[step[view]])
        found.append(
            ScoredView(
                update=int(update[view]),
                step=int(step[view]) if was_state else None,
                count=int(count[view]),
                weight=float(weight[view]),
                new_logp=sum((float(logp[i]) for i in at), 0.0),
                log_ratio=_log_ratio(tokens) if was_state else None,
                choice_old_logp=choice_old,
                choice_new_logp=None if choice_old is None else choice_new,
                tokens=tokens,
            )
        )
    return found


def _branches(kept: Mapping[str, Any]) -> list[Branch]:
    found, problem = kept.get("branches", []), "its branches are none"
    _require(isinstance(found, list) and len(found) <= MAX_SCORED, problem)
    branches = []
    for each in found:
        _require(isinstance(each, dict) and isinstance(each.get("rewards"), dict), problem)
        step = each.get("step")
        _require(isinstance(step, int) and 0 <= step < MAX_STEPS, problem)
        branches.append(
            Branch(
                step=step,
                text=_text(each.get("completion", "")),
                correct=each.get("correct") is True,
                reward=sum((_float(value) for value in each["rewards"].values()), 0.0),
                logp=_float(each["logp"]) if "logp" in each else None,
            )
        )
    return branches


def _token(cells: Cells, position: int, new: float, *, recorded: bool) -> ScoredToken:
    """``recorded``: in a state of the rollout, so that its own log-prob can be compared with."""
    if not recorded:
        return ScoredToken(position=position, old_logp=None, new_logp=new, ratio=None)
    old = _float(cells.logp[position])
    return ScoredToken(position=position, old_logp=old, new_logp=new, ratio=_exp(new - old))


def _log_ratio(tokens: list[ScoredToken]) -> float:
    return sum((_float(token.new_logp) - _float(token.old_logp) for token in tokens), 0.0)


def _array(arrays: Mapping[str, np.ndarray], name: str, kind: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Without a shape any of one dimension will do."""
    array = arrays.get(name)
    if array is None:
        raise UnreadableSample(f"its trajectory has no {name}")
    fits = array.ndim == 1 if shape is None else array.shape == shape
    _require(fits and array.dtype.kind in kind, f"its {name} has shape {array.shape} and type {array.dtype}")
    return array


def _inside(indices: np.ndarray, end: int) -> bool:
    return indices.size == 0 or (int(indices.min()) >= 0 and int(indices.max()) < end)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UnreadableSample(problem)


def _where(drawn: np.ndarray, values: np.ndarray) -> list[Number | None]:
    return [value if real else None for real, value in zip(drawn.tolist(), values.tolist(), strict=True)]


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def _text(value: Any) -> str:
    """Text that UTF-8 can carry."""
    return str(value).encode("utf-8", "replace").decode()


def _clean(value: Any) -> Any:
    """A JSON value whose texts and numbers every JSON can carry."""
    if isinstance(value, dict):
        return {_text(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return number(value)
    return _text(value) if isinstance(value, str) else value
