"""HellaSwag and CommonsenseQA: rows as published, and which option an answer names."""

import json
from pathlib import Path
from typing import Any

import pytest

from rewards.errors import DataError
from rewards.task import get_task
from rewards.tasks.multiple_choice import MultipleChoice

# Rows in the form of the hub's data sets; the texts are ours.
HELLASWAG = [
    {
        "ind": 14,
        "activity_label": "Washing hands",
        "ctx_a": "A boy stands at a sink.",
        "ctx_b": "he",
        "ctx": "A boy stands at a sink. he",
        "endings": ["opens the tap.", "rides the tap away.", "reads the sink aloud.", "sells the soap."],
        "source_id": "activitynet~v_abc",
        "split": "train",
        "split_type": "indomain",
        "label": "0",
    },
    {
        "ind": 15,
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to fix a chair [title] Turn it over. [step] Look at the legs.",
        "ctx_b": "",
        "ctx": "[header] How to fix a chair [title] Turn it over. [step] Look at the legs.",
        "endings": ["Paint a wall.", "Call a bank.", "Find the loose one. [substeps] Mark it.", "Eat a pear."],
        "source_id": "wikihow~1",
        "split": "train",
        "split_type": "zeroshot",
        "label": "2",
    },
]
COMMONSENSE = {
    "id": "075e483d21c29a511267ef62bedc0461",
    "question": "Where does a revolving door keep people from walking in too fast?",
    "question_concept": "revolving door",
    "choices": {
        "label": ["A", "B", "C", "D", "E"],
        "text": ["bank robbery", "bank", "new york", "new york city", "department store"],
    },
    "answerKey": "B",
}
OPTIONS = COMMONSENSE["choices"]["text"]  # type: ignore[index]

NAMED = [  # gold, completion, reason
    ("B", "<think>Doors.</think><answer>B</answer>", "the prompt's format"),
    ("B", "<answer>b</answer>", "a letter in lower case"),
    ("B", "<answer>(B)</answer>", "in brackets"),
    ("B", "<answer>[b].</answer>", "in others"),
    ("B", r"<answer>\boxed{B}</answer>", "in a box"),
    ("B", r"So \boxed{\text{(B)}}", "in a box without a tag"),
    ("B", "<answer>B.</answer>", "with a full stop"),
    ("B", "<answer>**B**</answer>", "bold"),
    ("B", "<answer>Option B</answer>", "named as an option"),
    ("B", "<answer>The answer is (B).</answer>", "in a sentence"),
    ("B", "The answer is (B).", "the same without a tag"),
    ("B", "Doors revolve.\nThe correct answer is: B", "the last line"),
    ("B", "**Answer:** B", "a mark in bold"),
    ("B", "The answer is option B. The others are too open.", "an explanation in a sentence of its own"),
    ("B", "The answer is B because money lies there.", "a reason"),
    ("B", "The answer is A. Wait. The answer is B.", "the last statement counts"),
    ("B", "The answer is B. I checked that the answer is correct.", "a mark that only confirms"),
    ("B", "B", "nothing but the letter"),
    ("B", "(b) bank", "letter and text alone"),
    ("B", "bank", "the text alone"),
    ("B", "<answer>A bank</answer>", "an article is no letter"),
    ("B", "<answer>the bank.</answer>", "another article"),
    ("B", "<answer>Bank!</answer>", "case and signs"),
    ("B", "<answer>B. bank</answer>", "letter and text"),
    ("B", "<answer>B bank</answer>", "parted by a space alone"),
    ("B", "<answer>B: A bank</answer>", "by a colon, with an article"),
    ("B", "<answer>B) bank. It is where money lies.</answer>", "letter, text and explanation"),
    ("B", "<answer>B is correct</answer>", "confirmed"),
    ("B", "<answer>A</answer> No. <answer>B</answer>", "the last tag counts"),
    ("A", "<answer>A</answer> No. <answer>B", "one that was cut off is none"),
    ("A", "<answer>bank robbery</answer>", "a text that begins with another option's"),
    ("C", "<answer>New York</answer>", "a text that is the beginning of another option's"),
    ("D", "<answer>New York City, because of its size</answer>", "a text that holds another option's"),
    ("D", "<answer>D. New York City. New York City is large.</answer>", "and its explanation"),
    ("E", "<answer>e) Department  store</answer>", "spaces"),
    ("E", "The answer is a department store. E.g. a large one.", "an abbreviation is no letter"),
]
NOT_NAMED = [
    ("", "nothing"),
    ("<answer></answer>", "an empty tag"),
    ("<answer>A or B</answer>", "two letters"),
    ("<answer>b or a</answer>", "in lower case"),
    ("<answer>(b) or (a)</answer>", "in brackets"),
    ("<answer>B, A</answer>", "in a list"),
    ("<answer>B. C</answer>", "set off"),
    ("<answer>B.C</answer>", "set off by a full stop alone"),
    ("<answer>A.B.C.D.E</answer>", "all of them"),
    ("The answer is A.B.C.", "the same in a sentence"),
    ("<answer>B and bank robbery</answer>", "a letter and another option's text"),
    ("<answer>(B) department store</answer>", "letter and text contradict each other"),
    ("<answer>B. New York</answer>", "the same behind a full stop"),
    ("<answer>B because A is wrong</answer>", "another option named in the reason"),
    ("<answer>B. It is no department store.</answer>", "by its text"),
    ("<answer>bank or department store</answer>", "two texts"),
    ("<answer>bank. Or C.</answer>", "a text and another letter"),
    ("<answer>F</answer>", "a letter that no option has"),
    ("<answer>2</answer>", "a number"),
    ("<answer>not B</answer>", "a denial"),
    ("<answer>B is wrong</answer>", "another"),
    ("<answer>B. This is wrong.</answer>", "taken back"),
    ("<answer>B?</answer>", "a question"),
    ("<answer>banks</answer>", "nearly a text"),
    ("<answer>a bank in new york</answer>", "two texts in one"),
    ("The answer is B. But this answer is wrong.", "taken back by a later sentence"),
    ("The answer is not B.", "a denial in a sentence"),
    ("B. It is where money lies.", "an explanation without a tag or a mark"),
    ("Banks have doors, so B it is", "prose"),
    ("<think>B</think>", "only thought"),
    ("<think>The answer is B", "thinking that is not closed"),
    ("A" * 5000, "a long text"),
]


@pytest.fixture(scope="module")
def task() -> MultipleChoice:
    found = get_task("commonsense_qa")
    assert isinstance(found, MultipleChoice)
    return found


def fields(answer: str = "B") -> dict[str, Any]:
    return {"question": COMMONSENSE["question"], "options": OPTIONS, "answer": answer}


@pytest.mark.parametrize(("gold", "completion", "why"), NAMED)
def test_an_option_is_named(task: MultipleChoice, gold: str, completion: str, why: str) -> None:
    right = [letter for letter in "ABCDE" if task.grade(fields(letter), completion).correct]
    assert right == [gold], why


@pytest.mark.parametrize(("completion", "why"), NOT_NAMED)
def test_no_option_is_named(task: MultipleChoice, completion: str, why: str) -> None:
    for letter in "ABCDE":
        grade = task.grade(fields(letter), completion)
        assert not grade.correct and grade.error and grade.components["correct"] == 0, why


def test_options_that_share_a_text_are_told_apart_by_letter_alone(task: MultipleChoice) -> None:
    shared = {"question": "?", "options": ["Bank.", "shop", "a bank"], "answer": "C"}
    assert task.grade(shared, "<answer>C</answer>").correct
    assert not any(task.grade(shared | {"answer": gold}, "<answer>bank</answer>").correct for gold in "ABC")


def test_options_that_signs_alone_tell_apart(task: MultipleChoice) -> None:
    numbers = {"question": "?", "options": ["C++", "3", "3.5", "-3", "C"], "answer": "B"}
    for gold, text in (("A", "c++."), ("B", "3"), ("B", "B. 3"), ("C", "3.5"), ("D", "-3."), ("D", "D: -3")):
        assert task.grade(numbers | {"answer": gold}, f"<answer>{text}</answer>").correct, text
    for text in ("B. -3", "D. 3", "A. C", "+3"):
        for gold in "ABCDE":
            assert not task.grade(numbers | {"answer": gold}, f"<answer>{text}</answer>").correct, text


def test_an_option_that_is_a_letter_is_named_by_its_own_letter(task: MultipleChoice) -> None:
    grades = {"question": "Best grade?", "options": ["B", "A", "C. elegans", "answer questions"], "answer": "A"}
    assert task.grade(grades, "<answer>A</answer>").correct
    assert not task.grade(grades, "<answer>B</answer>").correct
    assert task.grade(grades | {"answer": "C"}, "<answer>C. elegans</answer>").correct
    assert task.grade(grades | {"answer": "D"}, "<answer>answer questions</answer>").correct


def test_options_without_a_word(task: MultipleChoice) -> None:
    signs = {"question": "Which sign adds?", "options": ["-", "+"], "answer": "B"}
    assert task.grade(signs, "<answer>+</answer>").correct and not task.grade(signs, "<answer>-</answer>").correct


def test_the_reward_s_parts(task: MultipleChoice) -> None:
    whole = task.grade(fields(), "<think>Doors.</think><answer>B</answer>")
    assert whole.components == {"think_tag": 0.5, "answer_tag": 0.5, "correct": 3.0} and whole.error is None
    wrong = task.grade(fields(), "<answer>A</answer>")
    assert wrong.components == {"think_tag": 0.0, "answer_tag": 0.5, "correct": 0.0}
    assert wrong.error == "the answer is A, not B"


def test_hellaswag_s_rows(tmp_path: Path) -> None:
    hidden = HELLASWAG[0] | {"label": ""}
    number = HELLASWAG[1] | {"label": 2}  # as the authors' own files have it
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*HELLASWAG, hidden, number)))
    task = get_task("hellaswag")
    problems = task.problems("train", seed=0, size=9, path=str(tmp_path / "rows.jsonl"))
    assert [problem.id for problem in problems] == ["hellaswag-rows-1", "hellaswag-rows-2", "hellaswag-rows-4"]
    first, second, third = (problem.fields for problem in problems)
    assert first["question"] == "Washing hands: A boy stands at a sink. he"
    assert (first["answer"], first["source_id"]) == ("A", "activitynet~v_abc")
    assert second["question"] == "Home and Garden: How to fix a chair Turn it over. Look at the legs."
    assert second["options"][2] == "Find the loose one. Mark it." and second["answer"] == third["answer"] == "C"
    prompt = task.messages(first)[1]["content"]
    assert prompt.endswith(
        "\n\nA. opens the tap.\nB. rides the tap away.\nC. reads the sink aloud.\nD. sells the soap."
    )
    for answer in ("A", "opens the tap", "(a) opens the tap."):
        assert task.grade(first, f"<answer>{answer}</answer>").correct
    assert not task.grade(first, "<answer>rides the tap away.</answer>").correct
    assert task.leak_key(first) != task.leak_key(second) == task.leak_key(third)


def test_commonsense_qa_s_rows(tmp_path: Path) -> None:
    stem = {"stem": COMMONSENSE["question"], "question_concept": "revolving door"}
    pairs = [{"label": label, "text": text} for label, text in zip("ABCDE", OPTIONS, strict=True)]
    authors = {"answerKey": "B", "id": "1", "question": stem | {"choices": pairs}}
    rows = [COMMONSENSE, COMMONSENSE | {"answerKey": ""}, authors]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task("commonsense_qa")
    problems = task.problems("test", seed=0, size=9, path=str(tmp_path / "rows.jsonl"))
    assert [problem.fields for problem in problems] == [fields(), fields()]
    assert task.messages(fields())[1]["content"].startswith(f"{COMMONSENSE['question']}\n\nA. bank robbery\nB. bank\n")


@pytest.mark.parametrize(
    ("name", "row", "part"),
    [
        ("hellaswag", HELLASWAG[0] | {"label": "4"}, "number of an ending"),
        ("hellaswag", HELLASWAG[0] | {"label": "first"}, "number of an ending"),
        ("hellaswag", HELLASWAG[0] | {"endings": "opens"}, "endings must be a list"),
        ("hellaswag", HELLASWAG[0] | {"endings": ["one"]}, "2 to 26 texts"),
        ("hellaswag", HELLASWAG[0] | {"ctx": None}, "ctx must be"),
        ("hellaswag", HELLASWAG[0] | {"ctx": " ", "activity_label": ""}, "question must be"),
        ("commonsense_qa", COMMONSENSE | {"answerKey": "F"}, "one of the labels"),
        ("commonsense_qa", COMMONSENSE | {"choices": {"label": ["A"], "text": []}}, "as many texts as labels"),
        ("commonsense_qa", COMMONSENSE | {"choices": None}, "as many texts as labels"),
        ("commonsense_qa", COMMONSENSE | {"question": ""}, "question must be"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path: Path, name: str, row: dict[str, Any], part: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: .*{part}"):
        get_task(name).problems("train", seed=0, size=1, path=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "bad", [{"answer": "AB"}, {"answer": ""}, {"answer": "F"}, {"options": ["a", " "]}, {"options": 3}]
)
def test_fields_that_make_no_problem(task: MultipleChoice, bad: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        task.grade(fields() | bad, "B")


def test_default_sources() -> None:
    for name, hub in (("hellaswag", "Rowan/hellaswag"), ("commonsense_qa", "tau/commonsense_qa")):
        task = get_task(name)
        assert (task.source("train", None), task.source("test", None)) == (f"hub:{hub}:train", f"hub:{hub}:validation")
