"""The playback document: what was recorded, typed and complete; what is damaged or foreign, a problem document."""

import json
import math
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors.numpy import load, save

from services.dashboard.playback import UnreadableSample, order_map, playback
from services.dashboard.playback_models import Playback
from services.store import reader, schema
from services.store.__main__ import main
from tests.support.dashboards import Dashboard, Place, dashboard, writer
from tests.support.playable_runs import GRID, ODD, write_playable

C, M = 4, 2


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    """A sample of four positions in two steps, whose last position is a filler; one step was scored."""
    plain: dict[str, Any] = {
        "completion_ids": np.array([7, 8, 9, 0], np.int32),
        "unmask_step": np.array([1, 0, 0, 1], np.int16),
        "unmask_rank": np.array([0, 1, 0, 0], np.int16),
        "drawn": np.array([True, True, True, False]),
        "logp": np.array([-0.5, -1.0, 0.0, 0.0], np.float32),
        "logp_raw": np.array([-0.6, -1.1, 0.0, 0.0], np.float32),
        "entropy": np.array([0.7, 0.5, 0.0, 0.0], np.float32),
        "special": np.array([False, False, False, True]),
        "prompt_ids": np.array([1, 2], np.int32),
        "view_update": np.array([0], np.int16),
        "view_step": np.array([0], np.int16),
        "view_count": np.array([2], np.int32),
        "view_weight": np.array([1.5], np.float64),
        "view_choice_logp": np.array([np.nan], np.float32),
        "new_view": np.array([0, 0], np.int32),
        "new_position": np.array([1, 2], np.int32),
        "new_logp": np.array([-0.9, 0.0], np.float32),
    }
    return {name: value for name, value in (plain | changes).items() if value is not None}


def row(trajectory: bytes | None = None, *, kept: Any = None, **changes: Any) -> dict[str, Any]:
    """A row of the table ``samples``."""
    kept = {"version": 1, "tokens": ["a", "b", "\n", "<|end|>"]} if kept is None else kept
    data = {"seed": 2**62, "policy_version": 3, "nfe": 2, "advantage": 0.5, "sampler": {"steps": M, "temperature": 1.0}}
    about = {
        "id": 5,
        "run_id": "r",
        "iteration": 2,
        "kind": "train",
        "group_id": 9,
        "row": 1,
        "time": 1.0,
        "problem_id": "p",
        "prompt": "?",
        "completion": "ab",
        "correct": True,
        "reward": 1.5,
        "rewards": {"shape": 0.5, "verdict": 1.0},
        "data": data,
        "trajectory": trajectory if trajectory is not None else save(arrays(), {"playback": json.dumps(kept)}),
    }
    return about | changes


# ---- the document


def test_the_text_around_gaps_is_told_and_checked() -> None:
    kept = {"version": 1, "tokens": ["a", "b", "c", "d"]}

    def told(context: Any) -> Any:
        return playback(row(save(arrays(), {"playback": json.dumps(kept | {"context": context})}))).context

    assert playback(row()).context == []
    pieces = [{"before": 0, "text": "ab"}, {"before": 3, "text": "c\ud800"}]
    assert [(piece.before, piece.text) for piece in told(pieces)] == [(0, "ab"), (3, "c?")]
    for wrong in ({}, [1], [{"before": 99, "text": ""}], [{"before": -1, "text": ""}], pieces[::-1], [{"before": 0}]):
        with pytest.raises(UnreadableSample, match="the text around its gaps"):
            told(wrong)


def test_branches_are_told_and_checked() -> None:
    kept = {"version": 1, "tokens": ["a", "b", "c", "d"]}
    branch = {"step": 1, "completion": "ab", "correct": True, "rewards": {"shape": 0.5, "verdict": 1.0}}

    def told(branches: Any) -> Any:
        return playback(row(save(arrays(), {"playback": json.dumps(kept | {"branches": branches})}))).branches

    assert playback(row()).branches == []
    likeliest, drawn = told([branch, branch | {"logp": -2.5, "correct": False}])
    assert (likeliest.step, likeliest.text, likeliest.correct, likeliest.reward) == (1, "ab", True, 1.5)
    assert likeliest.logp is None and drawn.logp == -2.5 and not drawn.correct
    for broken in ("x", [1], [branch | {"step": -1}], [branch | {"step": "1"}], [branch | {"rewards": 3}]):
        with pytest.raises(UnreadableSample, match="its branches are none"):
            told(broken)


def test_the_document_says_what_was_recorded() -> None:
    found = playback(row())
    assert found.cells.text == ["a", "b", "\n", "<|end|>"]
    assert found.cells.step == [1, 0, 0, 1] and found.steps == M
    assert found.cells.confidence[:3] == pytest.approx([math.exp(-0.5), math.exp(-1), 1.0])
    assert found.cells.logp[3] is found.cells.entropy[3] is found.cells.confidence[3] is None, "a filler has no law"
    (scored,) = found.scored
    assert (scored.step, scored.count, scored.weight) == (0, 2, 1.5)
    assert [token.ratio for token in scored.tokens] == pytest.approx([math.exp(0.1), 1.0])
    assert scored.log_ratio == pytest.approx(0.1)
    assert scored.choice_new_logp is None, "random order is no action"
    assert found.provenance["seed"] == str(2**62), "JavaScript's numbers can't hold it"
    assert found.rewards == {"shape": 0.5, "verdict": 1.0} and found.advantage == 0.5
    assert found.notes == [] and "threshold" not in found.provenance
    drew = playback(row(data={"threshold": 0.7, "sampler": {"threshold": [0.5, 0.7]}}))
    assert drew.provenance["threshold"] == "0.7" and drew.sampler["threshold"] == [0.5, 0.7]


def test_a_drawn_mask_is_no_step_and_has_nothing_to_compare_with() -> None:
    """Step -1, a weight of any sign; a recorded step beside it keeps its ratio and its choice."""
    changes = {name: np.repeat(value, 2) for name, value in arrays().items() if name.startswith("view_")}
    changes |= {"view_step": np.array([-1, 0], np.int16), "view_weight": np.array([-0.5, 1.5])}
    changes |= {"new_view": np.array([0, 1], np.int32), "new_logp": np.array([-0.75, -0.9], np.float32)}
    changes |= {
        "view_choice_logp": np.array([-3.0, -1.5], np.float32),
        "position_logp": np.array([-2.0, 0], np.float32),
    }
    changes |= {"new_position": np.array([3, 1], np.int32)}
    mask, step = playback(row(save(arrays(**changes)))).scored
    assert (mask.step, mask.weight, mask.new_logp, mask.log_ratio) == (None, -0.5, -0.75, None)
    assert [(token.position, token.old_logp, token.new_logp, token.ratio) for token in mask.tokens] == [
        (3, None, -0.75, None)
    ]
    assert mask.choice_old_logp is mask.choice_new_logp is None
    assert (step.step, step.choice_old_logp) == (0, -2.0) and step.tokens[0].ratio == pytest.approx(math.exp(0.1))
    for wrong in (-2, 2**15 - 1 + 1):
        with pytest.raises(UnreadableSample, match="point nowhere"):
            playback(row(save(arrays(view_step=np.array([wrong], np.int32)))))


def test_choices_of_positions_have_old_and_new_log_probs() -> None:
    with_choices = arrays(
        position_logp=np.array([-2.0, 0.0], np.float32), view_choice_logp=np.array([-1.5], np.float32)
    )
    (scored,) = playback(row(save(with_choices))).scored
    assert (scored.choice_old_logp, scored.choice_new_logp) == (-2.0, -1.5)


def test_a_sample_of_an_older_version_is_shown_with_what_it_has() -> None:
    names = ("completion_ids", "unmask_step", "unmask_rank", "drawn", "logp", "logp_raw", "entropy", "prompt_ids")
    found = playback(row(save({name: arrays()[name] for name in names})))
    assert found.cells.text == ["#7", "#8", "#9", "#0"] and found.scored == []
    assert len(found.notes) == 2 and all("older version" in note for note in found.notes)


def test_numbers_that_are_none_have_names() -> None:
    odd = arrays(logp=np.array([-0.5, -1.0, np.nan, 0.0], np.float32), new_logp=np.array([np.inf, -np.inf], np.float32))
    sample = row(save(odd), rewards={"shape": "nan", "verdict": "-inf"}, reward=None)
    sample["data"]["sampler"]["position_temperature"] = math.inf
    found = json.loads(
        playback(sample).model_dump_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert found["cells"]["logp"][2] == "NaN" == found["cells"]["confidence"][2]
    assert found["scored"][0]["tokens"][0]["ratio"] == "Infinity"
    assert found["rewards"] == {"shape": "NaN", "verdict": "-Infinity"}
    assert found["sampler"]["position_temperature"] == "Infinity"


def test_text_that_is_no_unicode_is_replaced() -> None:
    found = playback(row(kept={"tokens": ["\ud800", "b", "c", "d"]}))
    assert found.cells.text[0] == "?"
    assert found.model_dump_json().encode()


DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "no safetensors": b"GIF89a" * 20,
    "cut short": save(arrays())[:-8],
    "a header of nonsense": (2**62).to_bytes(8, "little") + b"{}",
    "another's tensors": save({"weights": np.zeros((2, 2), np.float32)}),
    "no steps": save(arrays(unmask_step=None)),
    "steps of another length": save(arrays(unmask_step=np.zeros(5, np.int16))),
    "steps before the first": save(arrays(unmask_step=np.array([-1, 0, 0, 1], np.int16))),
    "steps as fractions": save(arrays(unmask_step=np.zeros(4, np.float32))),
    "no positions": save({name: value[:0] for name, value in arrays().items()}),
    "two dimensions": save({name: value[None] for name, value in arrays().items()}),
    "scored beyond the end": save(arrays(new_position=np.array([1, 4], np.int32))),
    "scored of no view": save(arrays(new_view=np.array([0, 7], np.int32))),
    "scored in part": save(arrays(new_logp=None)),
    "too few token texts": save(arrays(), {"playback": json.dumps({"tokens": ["a"]})}),
    "token texts that are none": save(arrays(), {"playback": json.dumps({"tokens": [1, 2, 3, 4]})}),
    "a header that is a list": save(arrays(), {"playback": "[]"}),
    "a header that is no JSON": save(arrays(), {"playback": "{"}),
    "a header without end": save(arrays(), {"playback": "[" * 100_000}),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_damaged_is_named_and_never_a_crash(what: str) -> None:
    with pytest.raises(UnreadableSample, match="^it"):
        playback(row(DAMAGED[what]))
    assert playback(row(save(arrays()))), "control: the undamaged one is played back"


@pytest.mark.parametrize("seed", range(40))
def test_no_flipped_byte_is_a_crash(seed: int) -> None:
    whole = save(arrays(), {"playback": json.dumps({"tokens": ["a", "b", "c", "d"]})})
    draw = np.random.default_rng(seed)
    damaged = bytearray(whole)
    for at in draw.integers(0, len(whole), 1 + seed % 4):
        damaged[at] = draw.integers(256)
    try:
        playback(row(bytes(damaged))).model_dump_json()
        order_map(row(bytes(damaged)))
    except UnreadableSample:
        pass


# ---- over HTTP


@pytest.fixture(scope="module")
def service(shared_place: Place) -> Iterator[Dashboard]:
    put_playable(shared_place, "sudoku-a")
    with writer(shared_place, "broken") as store:
        for number, (what, trajectory) in enumerate(DAMAGED.items()):
            store.sample(
                1,
                kind="train",
                group_id=number,
                row=0,
                problem_id=what,
                prompt="",
                completion="",
                correct=False,
                rewards={},
                trajectory=trajectory,
            )
        assert store.flush(30)
    with dashboard(shared_place) as service:
        yield service


def put_playable(place: Place, name: str, **options: Any) -> None:
    write_playable(place.folder, name, **options)
    if place.store is not None:
        assert main(["copy", str(place.folder / name), place.store]) == 0


def samples(service: Dashboard, run: str = "sudoku-a", **filters: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = service.api(f"runs/{run}/samples", limit=200, **filters)["items"]
    return items


@pytest.mark.slow
def test_a_sample_comes_with_its_group(service: Dashboard) -> None:
    listed = samples(service, kind="train", iteration=1)
    assert len(listed) == 8
    found = Playback(**service.api(f"runs/sudoku-a/samples/{listed[2]['id']}"))
    assert found.cells.text[: len(GRID)] in (GRID, [*GRID[:9], *"3421", *GRID[13:]])
    assert [sample.row for sample in found.siblings] == list(range(8))
    assert [sample.id for sample in found.siblings] == [sample["id"] for sample in listed]
    assert found.updates == 2 and {step.update for step in found.scored} == {0, 1}
    assert sum(step.count for step in found.scored if step.update == 0) == 4
    assert [frame.id for frame in found.counterparts] == [found.id], "this problem came once"


@pytest.mark.slow
def test_samples_are_found_by_what_they_say_and_by_iteration(service: Dashboard) -> None:
    found = samples(service, q="4321123434122143")
    assert found and all("4321123434122143" in sample["completion"] for sample in found)
    assert len(found) < len(samples(service)) == len(samples(service, q="puzzle"))
    assert [sample["problem_id"] for sample in samples(service, q="MADE-UP-1", kind="base")] == ["made-up-1"]
    assert samples(service, q="%") == [], "a sign is itself"
    assert {sample["question"] for sample in samples(service)} == {"Puzzle: 0321003004002100"}
    kept = service.api("runs/sudoku-a/sample-iterations")
    assert list(zip(kept["iteration"], kept["kind"], kept["samples"], strict=True)) == [
        *((0, "base", 2), (1, "train", 8), (2, "train", 8), (3, "train", 8), (3, "trained", 2))
    ]


@pytest.mark.slow
def test_a_playback_is_an_animated_picture_without_scripts(service: Dashboard) -> None:
    odd = samples(service, kind="train", iteration=3)[7]["id"]
    base, trained = (samples(service, kind=kind)[0]["id"] for kind in ("base", "trained"))
    for sample, query in ((odd, {}), (base, {"beside": trained, "theme": "dark"})):
        answer = service.get(f"/api/v1/runs/sudoku-a/samples/{sample}/animation", **query)
        assert answer.headers["content-type"] == "image/svg+xml" and len(answer.content) < 150_000
        picture = ElementTree.fromstring(answer.text)
        names = {element.tag.rpartition("}")[2] for element in picture.iter()}
        assert names == {"svg", "title", "rect", "line", "text", "animate"}
        texts = [element.text or "" for element in picture.iter() if element.tag.endswith("text")]
        assert "Step 8 of 8: none masked" in texts and "Puzzle: 0321003004002100" in texts
        for element in picture.iter():
            if element.tag.endswith("animate"):
                times = [float(time) for time in element.attrib["keyTimes"].split(";")]
                assert times[0] == 0 and times == sorted(times) and times[-1] <= 1
                assert len(times) == len(element.attrib["values"].split(";"))
    assert "base model" in texts and "trained, iteration 3" in texts
    assert service.get(f"/api/v1/runs/sudoku-a/samples/{odd}/animation", beside=999999).status_code == 404


@pytest.mark.slow
def test_base_and_trained_are_counterparts(service: Dashboard) -> None:
    base = samples(service, kind="base")
    assert len(base) == 2
    found = Playback(**service.api(f"runs/sudoku-a/samples/{base[0]['id']}"))
    assert [(other.kind, other.iteration) for other in found.counterparts] == [("base", 0), ("trained", 3)]
    assert {other.problem_id for other in found.counterparts} == {found.problem_id}
    assert [frame.completion for frame in found.counterparts] == [
        sample["completion"] for sample in (base[0], samples(service, kind="trained")[0])
    ]
    assert all(frame.layout is not None and len(frame.layout.cells) == 16 for frame in found.counterparts)
    assert found.scored == [] and found.advantage is None


@pytest.mark.slow
def test_the_order_map_is_the_iterations(service: Dashboard) -> None:
    found = service.api("runs/sudoku-a/order-map", iteration=2)
    assert (found["iteration"], found["positions"], found["steps"], found["completions"]) == (2, 24, 8, 48)
    assert sum(map(sum, found["counts"])) == 48 * 24
    assert service.api("runs/sudoku-a/order-map")["iteration"] == 3
    assert len(found["mean_step"]) == 24


@pytest.mark.slow
def test_odd_tokens_come_back_as_they_are(service: Dashboard) -> None:
    odd = [sample for sample in samples(service, iteration=3, kind="train") if sample["row"] == 7]
    found = service.api(f"runs/sudoku-a/samples/{odd[0]['id']}")
    assert found["cells"]["text"][: len(ODD)] == ODD


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("runs/sudoku-a/samples/999999", 404),
        ("runs/nobody/samples/1", 404),
        ("runs/sudoku-a/samples/-1", 422),
        ("runs/sudoku-a/samples/99999999999999999999", 422),
        ("runs/sudoku-a/samples/1%20or%201=1", 422),
        ("runs/sudoku-a/order-map?iteration=77", 404),
        ("runs/sudoku-a/order-map?iteration=-1", 422),
        ("runs/broken/order-map", 409),
        ("runs/sudoku-a/samples/9223372036854775807", 404),
    ],
)
def test_what_is_not_there_is_a_problem_document(service: Dashboard, path: str, status: int) -> None:
    path, _, query = path.partition("?")
    answer = service.get(f"/api/v1/{path}", **dict([query.split("=")] if query else []))
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status


@pytest.mark.slow
def test_every_damaged_sample_is_a_problem_document(service: Dashboard) -> None:
    listed = samples(service, "broken")
    assert len(listed) == len(DAMAGED)
    for sample in listed:
        answer = service.get(f"/api/v1/runs/broken/samples/{sample['id']}")
        assert answer.status_code == 409, (sample["problem_id"], answer.text)
        assert f"sample {sample['id']} can't be played back: it" in answer.json()["detail"]


def test_what_the_recorder_writes_is_what_the_dashboard_reads(place: Place) -> None:
    """The names of the arrays, which the two sides can't share in code."""
    put_playable(place, "r", iterations=1)
    engine = schema.open_engine(place.url("r"), create=False, read_only=True)
    first = reader.Reader(engine).samples("r", kind="train").rows[0]
    whole = reader.Reader(engine).sample("r", first["id"])
    engine.dispose()
    assert whole is not None
    recorded = load(whole["trajectory"])
    assert set(arrays()) <= set(recorded)
    found, batch = playback(whole), order_map(whole)
    assert found.notes == [] and found.scored and batch is not None
    assert sum(len(step.tokens) for step in found.scored) == recorded["new_logp"].size
