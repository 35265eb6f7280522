"""Products of reactions: verdicts by molecule, where the gap is, and the reactions that ship."""

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.errors import DataError
from rewards.infill import SEPARATOR, Infill, Span
from rewards.reactions import knows_molecules, words
from rewards.task import Problem, get_task

TASK, MIDDLE = get_task("reaction"), get_task("reaction_span")
FIELDS = {"reactants": "Clc1ncc(Br)cn1.FC1(F)CCNCC1", "product": "FC1(F)CCN(c2ncc(Br)cn2)CC1", "gap": [14, 23]}


def asked(fields: dict[str, Any] = FIELDS) -> str:
    start, end = fields["gap"]
    return "".join(words(fields["product"])[start:end])


def test_words_of_smiles() -> None:
    assert words("C[C@@H](Br)%12>>Cl") == ["C", "[C@@H]", "(", "Br", ")", "%12", ">>", "Cl"]


def test_the_recorded_end_is_right_also_with_spaces_and_another_is_not() -> None:
    found = TASK.grade(FIELDS, " ".join(words(asked())))
    assert (found.correct, found.components) == (True, {"words": 1.0, "value": 1.0})
    wrong = TASK.grade(FIELDS, asked().replace("Br", "Cl"))
    assert not wrong.correct and wrong.components["words"] == pytest.approx(8 / 9) and wrong.components["value"] == 0
    for nothing in ("", f"C{SEPARATOR}C", "C" * 2000):
        assert not TASK.grade(FIELDS, nothing).correct


def test_another_writing_of_the_same_molecule_is_right_where_molecules_are_known() -> None:
    fields = {"reactants": "CCO.Br", "product": "CCBr", "gap": [1, 3]}
    assert TASK.grade(fields, "CBr").correct
    other = {**fields, "product": "C(C)Br", "gap": [1, 5]}  # C, then (C)Br or CBr
    assert TASK.grade(other, "CBr").correct == knows_molecules()


def test_where_the_gap_is() -> None:
    product = FIELDS["product"]
    count = len(words(product))
    assert TASK.gap("C", product) == [count - TASK.WORDS, count] and TASK.gap("C", "CCBr") == [1, 3]
    start, end = MIDDLE.gap(FIELDS["reactants"], product)
    assert 1 <= start < end <= count and end - start == MIDDLE.WORDS
    starts = {MIDDLE.gap(f"C{n}", product)[0] for n in range(40)}
    assert len(starts) > 3, "it follows from the reaction"
    prompt = MIDDLE.prompt({**FIELDS, "gap": [2, 5]})
    assert isinstance(prompt, Infill) and prompt.form == "single"
    assert prompt.parts == (f"{FIELDS['reactants']}>>FC", Span((3,)), ")CCN(c2ncc(Br)cn2)CC1")
    assert TASK.expected(FIELDS) == asked()


def test_the_reactions_that_ship_are_problems_apart_by_scaffold() -> None:
    for task in (TASK, MIDDLE):
        train, test = (task.problems(split, seed=0, size=5000) for split in ("train", "test"))
        assert len(train) == 2000 and len(test) == 300
        task.check_disjoint(train, test)
        for problem in (*train[:50], *test[:50]):
            assert task.grade(problem.fields, task.expected(problem.fields) or "").correct


def test_the_same_product_of_other_reactants_is_left_out() -> None:
    train, test = (TASK.problems(split, seed=0, size=20) for split in ("train", "test"))
    other = Problem("other", test[0].fields | {"reactants": "C"})
    assert TASK.without_leaks([*train, other], test) == train


def test_a_file_needs_reactants_and_product(tmp_path: Path) -> None:
    file = tmp_path / "reactions.jsonl"
    rows = [{"reactants": "CCO", "product": "CCBr"}, {"reactants": "C", "product": "C"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (problem,) = TASK.problems("train", seed=0, size=5, path=str(file))
    assert problem.fields == {**rows[0], "gap": [1, 3]}, "nothing would stand before the gap of the second"
    file.write_text(json.dumps({"reactants": " CC O", "product": "CC Br\n"}) + "\n")
    (problem,) = TASK.problems("train", seed=0, size=5, path=str(file))
    assert problem.fields == {**rows[0], "gap": [1, 3]}, "blanks are no words"
    table = tmp_path / "reactions.csv"
    table.write_text('reactants,product,gap\nCCO,CCCBr,"[1, 3]"\nCCO,CCCBr,\n')
    gaps = [problem.fields["gap"] for problem in TASK.problems("train", seed=0, size=5, path=str(table))]
    assert sorted(gaps) == [[1, 3], [1, 4]]
    for wrong in (0, []):
        file.write_text(json.dumps({**rows[0], "gap": wrong}) + "\n")
        with pytest.raises(DataError, match="gap is"):
            TASK.problems("train", seed=0, size=5, path=str(file))
    file.write_text(json.dumps({"reactants": "CCO"}) + "\n")
    with pytest.raises(DataError, match="needs reactants and product"):
        TASK.problems("train", seed=0, size=5, path=str(file))


@pytest.mark.parametrize(
    "changes",
    [
        {"product": "CC>>C"},
        {"reactants": ""},
        {"gap": [0, 2]},
        {"gap": [3, 99]},
        {"gap": None},
        {"gap": [2]},
        {"product": "C C"},
    ],
)
def test_fields_that_make_no_problem_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        TASK.grade({**FIELDS, **changes}, "C")
