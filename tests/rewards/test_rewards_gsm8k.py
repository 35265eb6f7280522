r"""GSM8K: what a completion's answer is, in the spellings that models use, and the task around it."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.errors import DataError
from rewards.maths.answers import final_answer
from rewards.task import get_task
from rewards.tasks.gsm8k import Gsm8k

ROOT = Path(__file__).resolve().parents[2]

RIGHT = [  # gold, completion, reason
    ("42", "<think>6*7</think><answer>42</answer>", "the prompt's format"),
    ("42", r"<think>6*7</think><answer>\boxed{42}</answer>", "with the box"),
    ("42", r"<answer>The total is \boxed{42} apples.</answer>", "an explanation around the box"),
    ("42", r"So she has $\boxed{42}$ apples.", "a box without a tag"),
    ("42", r"\boxed 42", "a box without braces"),
    ("42", r"First \boxed{6}, then she buys more, which makes \boxed{42}.", "the last of several boxes"),
    ("42", r"\boxed{42} \boxed{42} \boxed{42}", "the same box again and again"),
    ("42", r"\boxed{42} " * 2000, "for thousands of characters"),
    ("42", r"\boxed{42} \boxed{}", "an empty box says nothing"),
    ("42", r"\boxed{\boxed{42}}", "nested"),
    ("42", r"\boxed{42\text{ dollars}}", "a unit in the box"),
    ("42", r"\boxed{\$42}", "currency in the box"),
    ("42", r"\boxed{42.00}", "cents"),
    ("42", r"\boxed{x = 42}", "an equation in the box"),
    ("42", r"\boxed{6 \times 7 = 42}", "a calculation in the box"),
    ("42", r"\boxed{42} or \boxed{42.0}", "the same value in two boxes"),
    ("42", "6*7 is 42.\n#### 42", "the data set's own mark"),
    ("42", "#### 42 apples", "with a unit"),
    ("42", "#### $42.", "with currency"),
    ("42", "The answer is 42.", "a sentence"),
    ("42", "The answer is: 42", "a colon"),
    ("42", "The final answer is $42$. I hope it is correct.", "a sentence after it"),
    ("42", "**Answer:** 42", "markdown"),
    ("42", "**Answer: 42**", "bold to the end"),
    ("42", "Answer:\n\n42", "on the next line"),
    ("42", "The answer is 42 because 6*7 is 42.", "a reason after it"),
    ("42", "The answer is 42, since she had 6 bags.", "another"),
    ("42", "The answer is 42 dollars per day.", "unit words"),
    ("42", "The answer is 6*7 = 42.", "a calculation"),
    ("42", "The answer is 41. Wait. The answer is 42.", "the last statement counts"),
    ("42", "The answer is 42. I double-checked and the answer is correct.", "a mark without a number"),
    ("42", "#### 42\nThis result is consistent with the question.", "another"),
    ("42", "#### 42\nThe result is 6 times 7.", "the data set's mark before others"),
    ("42", "The answer is 42.\n####", "a mark without anything"),
    ("360", "<answer>\n\\boxed{360\n</answer>", "the tag closes the box"),
    ("360", "<answer>\n\\boxed{360 \\text{ cups\n</answer>", "and what is open in it"),
    ("120", "<answer>\n\\boxed{120\n</answer}", "both closers damaged"),
    ("4", "<answer>boxed{4}</answer>", "a box without its backslash"),
    ("5", "So it is 5.\n<answer>\n</answer>\n\n\\boxed{5}", "an empty tag, the box behind it"),
    ("20", "<answer>5 x 4 = 20</answer>", "x for a product"),
    ("20", r"\boxed{5 x 4 = 20}", "in a box"),
    ("12", r"<answer>\boxed{12 \text{ cups of water every day.}}</answer>", "unit words"),
    ("2", r"\boxed{2:00 \text{ pm}}", "the hour"),
    ("42", "<think>6*7 <answer>42</answer>", "thinking that is not closed ends with the answer tag"),
    ("42", "6*7 makes 42. Therefore, Janet makes $42 every day.", "a conclusion with one number"),
    ("42", "She has 6 bags.\nSo she has 42 apples.", "on a line of its own"),
    ("42", "Therefore, the total is 40 + 2 = 42 dollars.", "a calculation in the conclusion"),
    ("42", "<answer>6 bags * 7 apples = 42 apples</answer>", "a calculation with units in the tag"),
    ("42", r"Therefore, Janet makes \( 6 \times 7 = 42 \) dollars every day.", "a formula in the conclusion"),
    ("42", "<answer>Janet makes $42 every day.</answer>", "the only number in the tag"),
    ("42", "<answer>42 apples</answer>", "a unit in the tag"),
    ("42", "<answer>\n42\n</answer>", "newlines"),
    ("42", "<ANSWER>42</ANSWER>", "case of the tag"),
    ("42", "<answer>41</answer> No. <answer>42</answer>", "the last tag"),
    ("42", "<answer>42", "a tag that was cut off at the end"),
    ("42", "<think>41</think><answer>42</answer> \U0001f600", "an emoji after it"),
    ("42", "<answer>42</answer><|eot_id|><|endoftext|>", "special tokens"),
    ("42", "42", "nothing but the number"),
    ("1234", r"\boxed{1,234}", "thousands"),
    ("1234", "The answer is $1,234.00.", "thousands, currency and cents before the full stop"),
    ("-5", r"\boxed{-5}", "negative"),
    ("-5", "The answer is -5.", "negative in a sentence"),
    ("3.5", "The answer is 3.50 hours.", "a decimal before the full stop"),
    ("50", r"\boxed{50\%}", "a percentage"),
    ("50", "The answer is 50%.", "in a sentence"),
    ("1000", "The answer is 1,000 miles.", "a unit after thousands"),
    ("5", "<answer>five</answer>", "a number word"),
    ("42", "<think>The answer is 41.</think>The answer is 42.", "thinking is not read"),
    ("42", "The answer is \x00 42.", "a control character"),
    ("42", r"The answer is \(42\).", "math delimiters"),
    ("42", r"The answer is: \[ 42 \]", "displayed"),
    ("42", "The answer is **42**.", "bold"),
    ("18", "Janet sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", "a whole solution"),
    ("42", "6 bags of 7 apples.\nJanet has 42 apples.", "a last sentence that is whole, with one number"),
    ("64", "Thus, he pays $24 + $40 = $<<24+40=64>>64 for the glasses.", "a calculator note, as in the training set"),
]

WRONG = [
    ("42", "", "nothing"),
    ("42", "   \n ", "spaces"),
    ("42", "<answer></answer>", "an empty tag"),
    ("42", r"\boxed{}", "an empty box"),
    ("42", r"\boxed{41}", "another number"),
    ("42", r"First \boxed{42}, then \boxed{6}.", "the last box is wrong"),
    ("42", r"\boxed{42} or \boxed{43}", "a choice of two boxes"),
    ("42", r"<answer>\boxed{41}, \boxed{42}</answer>", "the same in the tag"),
    ("42", r"\boxed{42", "a box that is not closed may go on"),
    ("42", r"\boxed{42}<answer>41</answer>", "a box outside the tag is not read"),
    ("42", "<think>The answer is 42.</think>", "only thought"),
    ("42", "<answer>42</answer><answer>41</answer>", "the last tag"),
    ("42", "She has 42 apples and 6 bags.", "two numbers in prose"),
    ("42", "She has 42 apples.\nI am not sure.", "a number that nothing concludes"),
    ("42", "The answer is 42 or 43.", "a choice"),
    ("42", "The answer is not 42.", "a denial"),
    ("42", "The answer is more than 42.", "a bound"),
    ("42", "The answer is between 40 and 44.", "a range"),
    ("42", "Therefore she has 42 apples, 6 a bag.", "two numbers in the conclusion"),
    ("42", "Therefore, 2x = 42.", "an unknown that is not solved for"),
    ("42", "First she buys 6 bags. Then she has 42", "a sentence that may have been cut off"),
    ("42", "24 + 40 = <<24+18=42>>64.", "a note alone is no answer"),
    ("42", r"Therefore, Janet makes \( 42 \) dollars in \( 6 \) days.", "two formulas"),
    ("42", "<answer>41 + 1</answer><answer>6 * 8</answer>", "an expression of another value"),
    ("42", "The answer is 42. Wait. The answer is 41.", "the last statement counts"),
    ("42", "#### 42\n#### 41", "the last mark counts"),
    ("42", "The answer is 42. But this answer is wrong.", "taken back"),
    ("5", r"So \boxed{5}. Wait, that is wrong. The final answer is \boxed{6", "a draft, the last box cut off"),
    ("5", r"The answer is 5. \boxed{", "cut off before its first digit"),
    ("42", r"<think>maybe \boxed{42}? let me check", "thinking that is not closed"),
    ("42", r"<answer>\boxed{42", "a tag and a box that were cut off"),
    ("5", "<answer>\\boxed{5} or \\boxed{6\n</answer>", "a choice of two boxes, one closed by the tag"),
    ("2", r"\boxed{2:30}", "no full hour"),
    ("42", "#### ", "a mark with nothing after it"),
    ("1234", r"\boxed{1}", "what a parser that stops at the comma reads"),
    ("1234", r"\boxed{1,23}", "a list"),
    ("1", "The answer is 1,234.", "a gold that is the first digits"),
    ("5", r"\boxed{-5}", "the sign"),
    ("3", "The answer is 3.5.", "a gold that is the whole part"),
    ("42", "42" * 50, "repetition"),
    ("42", "4 2", "digits apart"),
    ("42", r"\boxed{42x}", "a variable"),
    ("2", r"\boxed{\sqrt{2+\sqrt{4}}}", "an expression that needs symbols: GSM8K's answers are numbers"),
    ("42", "\U0001f600", "an emoji"),
    ("42", "{" * 1000 + "42", "unbalanced braces"),
]


@pytest.fixture(scope="module")
def task() -> Gsm8k:
    found = get_task("gsm8k")
    assert isinstance(found, Gsm8k)
    return found


@pytest.mark.parametrize(("gold", "completion", "reason"), RIGHT)
def test_right(task: Gsm8k, gold: str, completion: str, reason: str) -> None:
    grade = task.grade({"question": "?", "answer": gold}, completion)
    assert grade.correct and grade.error is None and grade.components["correct"] == 3.0, (reason, grade.error)


@pytest.mark.parametrize(("gold", "completion", "reason"), WRONG)
def test_wrong(task: Gsm8k, gold: str, completion: str, reason: str) -> None:
    grade = task.grade({"question": "?", "answer": gold}, completion)
    assert not grade.correct and grade.error and grade.components["correct"] == 0.0, reason


def test_components(task: Gsm8k) -> None:
    def parts(completion: str) -> list[float]:
        grade = task.grade({"answer": "7"}, completion)
        assert tuple(grade.components) == task.components == ("think_tag", "answer_tag", "correct")
        return list(grade.components.values())

    assert parts("<think>a\nb</think>\n<answer>7</answer>") == [0.5, 0.5, 3.0]
    assert parts("<answer>8</answer>") == [0.0, 0.5, 0.0]
    assert parts("<think>a</think> 7") == [0.5, 0.0, 3.0]
    assert parts("<think>a <answer>7") == [0.0, 0.0, 3.0]
    assert parts("</think><think>") == [0.0, 0.0, 0.0]


def test_the_prompt_names_the_format(task: Gsm8k) -> None:
    system, user = task.messages({"question": " How many? ", "answer": "7"})
    assert (system["role"], user) == ("system", {"role": "user", "content": "How many?"})
    assert all(part in system["content"] for part in ("<think>", "</think>", "<answer>", "</answer>", r"\boxed"))


def test_rows_of_the_published_files(task: Gsm8k) -> None:
    row = {"question": "Q", "answer": "a #### b\n#### -1,234"}
    assert task.fields_from_row(row) == {"question": "Q", "answer": "-1234"}
    for bad in ({"question": "Q"}, {"question": "Q", "answer": "seven"}, {"question": "", "answer": "#### 7"}):
        with pytest.raises(DataError):
            task.fields_from_row(bad)


def test_leak_key_is_the_question_without_its_looks(task: Gsm8k) -> None:
    keys = {task.leak_key({"question": text}) for text in ("How many eggs?", "how  many eggs", "How many hens?")}
    assert len(keys) == 2


def test_default_sources(task: Gsm8k) -> None:
    assert task.source("train", None) == "hub:openai/gsm8k:main:train"
    assert task.source("test", "mine.jsonl") == "mine.jsonl"


def test_a_gold_that_is_no_number_is_a_data_error(task: Gsm8k) -> None:
    for gold in (None, "", "1,234", "seven", 7):
        with pytest.raises(DataError):
            task.grade({"answer": gold}, "7")


def test_every_gold_of_the_data_is_its_own_right_answer(task: Gsm8k, shared: Path) -> None:
    problems = task.problems("train", seed=0, size=10**6, path=str(shared / "data" / "gsm8k_train.jsonl.gz"))
    problems += task.problems("test", seed=0, size=10**6, path=str(shared / "data" / "gsm8k_test.jsonl.gz"))
    assert len(problems) == 7473 + 1319
    golds = [problem.fields["answer"] for problem in problems]
    assert {"-10", "-3"} < set(golds)
    for problem, other in zip(problems, [*golds[1:], golds[0]], strict=True):
        assert task.grade(problem.fields, rf"<answer>\boxed{{{problem.fields['answer']}}}</answer>").correct
        assert task.grade(problem.fields, f"The answer is {other}.").correct == (other == problem.fields["answer"])


def test_every_gold_solution_is_right(task: Gsm8k, shared: Path) -> None:
    with gzip.open(shared / "data" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert all(task.grade(task.fields_from_row(row), row["answer"]).correct for row in rows)
    assert not any(
        task.grade(task.fields_from_row(row), row["answer"] + "0").correct for row in rows if row["answer"][-1] != "0"
    )


def test_completions_of_any_kind_are_graded_quickly(task: Gsm8k) -> None:
    rng = random.Random(0)
    pieces = ["<think>", "</think>", "<answer>", "</answer>", r"\boxed{", "}", "{", "42", "The answer is ", ".", "\n",
              "#### ", "so ", " or ", ", ", "$", "**", "(", "\u00bd", "\x00", "=", "7 * 6", "apples ",
              "therefore "]  # fmt: skip
    for _ in range(1500):
        task.grade({"answer": "42"}, "".join(rng.choices(pieces, k=rng.randrange(1, 60))))
    for text in [
        *pieces,
        *(piece * 3000 for piece in pieces),
        "1,234," * 5000,
        "a.b " * 20_000,
        " . " * 30_000,
        "-" * 60_000,
    ]:
        begin = time.process_time()
        task.grade({"answer": "42"}, text * 2)
        assert time.process_time() - begin < 0.5, text[:40]


def test_final_answers_of_a_cut_off_text() -> None:
    assert final_answer("<answer>").candidates == ("<answer>",)
    assert final_answer("x" * 100_000).candidates == ()


def test_the_command_line_grades_gsm8k(shared: Path) -> None:
    lines = [json.dumps({"id": gold, "answer": gold, "completion": text}) for gold, text, _ in RIGHT + WRONG]
    done = subprocess.run(
        [sys.executable, "-m", "rewards.grade", "--task", "gsm8k"],
        input="\n".join(lines), capture_output=True, timeout=60, cwd=ROOT, text=True,
    )  # fmt: skip
    verdicts = [json.loads(line)["correct"] for line in done.stdout.splitlines()]
    assert verdicts == [True] * len(RIGHT) + [False] * len(WRONG)
