"""Loops for antibodies: what is right, what is said of the rest, and the chains that ship."""

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.antibodies import loops
from rewards.errors import DataError
from rewards.infill import SEPARATOR, Infill, Span
from rewards.task import Problem, get_task

TASK, ALL = get_task("antibody_cdr"), get_task("antibody_cdrs")
LEFT = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSDYAMHWVRQAPGKGLEWVSAITYNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC"
CHAIN = f"{LEFT}AKVSYLSTASSLDYWGQGTLVTVSS"
FIELDS = {"chain": CHAIN, "loops": [[96, 110]]}
RIGHT = "ARGSYRSTAGSLDY"
"""Charge 1, hydropathy below 0, and no motif, as what follows shows one by one."""


def grade(loop: str, fields: dict[str, Any] = FIELDS) -> Any:
    return TASK.grade(fields, loop)


def test_a_loop_without_motifs_in_both_windows_is_right() -> None:
    found = grade(" ".join(RIGHT))
    assert (found.correct, found.error) == (True, None) and found.components == dict.fromkeys(TASK.components, 1.0)


@pytest.mark.parametrize(
    ("loop", "told"),
    [
        ("ARGSYRSTNASLDY", "glycosylation of NAS"),
        ("ARGSYRSTANGLDY", "deamidation of NG"),
        ("ARGSYRSTADGRDY", "isomerization of DG"),
        ("ARGSYRSTAGSLMY", "oxidation of M"),
        ("ARGSYRSTAGCLDY", "cysteine of C"),
        ("ARGSYRSTADPRDY", "cleavage of DP"),
        ("AGGSYGSTAGSLDY", "net charge -1"),
        ("ARGSYKSTAGSLRY", "net charge 3"),
        ("ARGVVRIVVGILDI", "hydropathy 1"),
    ],
)
def test_each_rule_is_told(loop: str, told: str) -> None:
    found = grade(loop)
    assert not found.correct and told in found.error and found.components["value"] == 0
    assert min(found.components.values()) >= 0 and max(found.components.values()) <= 1


def test_a_motif_that_begins_in_the_framework_counts() -> None:
    fields = {"chain": CHAIN.replace("YYCAK", "YYNAK"), "loops": [[96, 110]]}
    assert "deamidation of NS" in grade("SRGSYRSTAGSLDY", fields).error
    assert grade(RIGHT, fields).correct, "control: the loop begins otherwise"


@pytest.mark.parametrize(
    ("completion", "told"),
    [
        ("", "has 0 residues, not 14"),
        (RIGHT[:-1], "has 13 residues, not 14"),
        (f"{RIGHT[:-1]}X", "X in loop 1 is no amino acid"),
        (f"{RIGHT}{SEPARATOR}A", "2 loops, not 1"),
    ],
)
def test_what_is_no_loop_earns_nothing(completion: str, told: str) -> None:
    found = grade(completion)
    assert told in found.error and not any(found.components.values())


def test_the_prompt_is_the_chain_with_its_loops_as_gaps() -> None:
    prompt = TASK.prompt(FIELDS)
    assert isinstance(prompt, Infill) and prompt.form == "single"
    assert prompt.parts == (LEFT, Span((14,)), "WGQGTLVTVSS")
    (problem,) = ALL.problems("test", seed=0, size=1)
    three = ALL.prompt(problem.fields)
    assert isinstance(three, Infill) and sum(isinstance(part, Span) for part in three.parts) == 3


def test_the_chains_that_ship_are_problems_and_no_loop_is_on_both_sides() -> None:
    for task in (TASK, ALL):
        train, test = (task.problems(split, seed=0, size=1000) for split in ("train", "test"))
        assert len(train) >= 40 and len(test) >= 10
        for problem in (*train, *test):
            task.validate_fields(problem.fields)
        task.check_disjoint(train, test)
        assert task.problems("train", seed=5, size=3) == train[:3]


def test_a_training_chain_with_a_held_out_third_loop_is_left_out() -> None:
    train, test = (TASK.problems(split, seed=0, size=1000) for split in ("train", "test"))
    chain, spans = test[0].fields["chain"], test[0].fields["loops"]
    other = Problem("other", {"chain": "A" + chain[1:], "loops": spans})
    assert other.fields != test[0].fields and TASK.without_leaks([*train, other], test) == train
    with pytest.raises(DataError, match="train problem other and test problem"):
        TASK.check_disjoint([other], test)


def test_a_file_needs_chains_alone(tmp_path: Path) -> None:
    file = tmp_path / "chains.jsonl"
    file.write_text(json.dumps({"chain": CHAIN}) + "\n")
    (problem,) = TASK.problems("train", seed=0, size=5, path=str(file))
    found = loops(CHAIN)
    assert found is not None and problem.fields["loops"] == [list(found.h3)] == FIELDS["loops"]
    file.write_text(json.dumps({"chain": "EVQL"}) + "\n")
    with pytest.raises(DataError, match="no loops are found in the chain 'EVQL'"):
        TASK.problems("train", seed=0, size=5, path=str(file))


@pytest.mark.parametrize(
    "changes",
    [
        {"chain": "EVQX"},
        {"chain": None},
        {"loops": []},
        {"loops": [[0, 5]]},
        {"loops": [[9, 9]]},
        {"loops": [[9, 999]]},
    ],
)
def test_fields_that_make_no_problem_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        grade(RIGHT, {**FIELDS, **changes})
