"""Finding the submitted answer: tags, thinking, boxes."""

import pytest

from rewards.parsing import MAX_CHARACTERS, Submission, boxed, plain_operators, shorten, submission

SUBMISSIONS = [
    ("<answer>7</answer>", "7", True, "the plain case"),
    ("<ANSWER>\n 7 \n</Answer> bye", "7", True, "any case, inner whitespace stripped, text after it ignored"),
    ("7", "7", False, "untagged text is the answer itself, and marked"),
    ("<answer>1</answer> no: <answer>2</answer>", "2", True, "the last complete block counts"),
    ("<answer>1</answer><answer>2", "1", True, "a block cut off at the end is not complete"),
    ("<answer><answer>7</answer>", "7", True, "the nearest opening tag belongs to the closing one"),
    ("</answer><answer>7</answer></answer>", "7", True, "stray closing tags do nothing"),
    ("<think><answer>1</answer></think><answer>2</answer>", "2", True, "thinking is not an answer"),
    ("<answer>2</answer><think><answer>1</answer></think>", "2", True, "nor is thinking afterwards"),
    ("<think><answer>1</answer></think>", "", False, "an answer only inside the thinking is none"),
    ("<think>2<answer>1</answer>", "1", True, "thinking that is not closed goes on to the answer tag"),
    ("<think>maybe 2", "", False, "or to the end"),
    (r"<think>maybe \boxed{2}? let me", "", False, "with its boxes"),
    ("</think><answer>1</answer>", "1", True, "an unopened one hides nothing"),
    ("<think>a</think> 7", "7", False, "untagged after thinking"),
    ("<answer></answer>", "", True, "an empty answer is an answer"),
    ("", "", False, "nothing"),
    (r"<answer>\boxed{7}</answer>", "7", True, "a box inside the tag"),
    (r"so \boxed{7}.", "7", False, "a box without a tag"),
    (r"\boxed{1}<answer>7</answer>", "7", True, "a box outside the answer is not read"),
    ("<answer>\n\\boxed{7\n</answer>", "7", True, "the tag closes the box"),
    ("<answer>\\boxed{\\frac{1}{2}</answer>", "\\frac{1}{2}", True, "with braces in it"),
    ("<answer>\n\\boxed{7\n</answer}", "7", False, "both closers damaged: read, and not complete"),
    ("<answer>7</answer", "7", False, "the last character lost"),
    ("<answer>7</answers>", "<answer>7</answers>", False, "another tag"),
    ("<answer>boxed{7}</answer>", "7", True, "a box without its backslash"),
    ("<answer>\\\\boxed{7}</answer>", "7", True, "a box with two"),
    ("<answer>unboxed{7}</answer>", "unboxed{7}", True, "another word"),
    ("So 5.\n<answer>\n</answer>\n\n\\boxed{7}", "7", True, "an empty tag, the box behind it"),
    ("<answer>\\boxed{}</answer> 7", "7", True, "an empty box in it"),
    ("<answer>6</answer> \\boxed{7}", "6", True, "a filled one counts"),
    (r"So \boxed{7}. Wait, no: \boxed{6", "", False, "an earlier box is a draft when the last was cut off"),
    (r"<answer>\boxed{7} or \boxed{6</answer>", "7", True, "the control: the tag closes it"),
    ("<|im_start|><answer>7<|mdm_mask|></answer><|eot_id|>", "7", True, "special tokens"),
    ("<\u0131answer>7</answer>", "<\u0131answer>7</answer>", False, "letters that fold to ASCII make no tag"),
]


@pytest.mark.parametrize(("completion", "text", "tagged", "reason"), SUBMISSIONS, ids=[row[3] for row in SUBMISSIONS])
def test_submission(completion: str, text: str, tagged: bool, reason: str) -> None:
    assert submission(completion) == Submission(text, tagged), reason


BOXES = [
    (r"\boxed{3+5}", "3+5", "plain"),
    (r"\boxed {3}", "3", "space before the brace"),
    (r"\boxed{\frac{1}{2}} or \boxed{3}", r"\frac{1}{2}", "inner braces; the first of two boxes"),
    (r"\boxed{\boxed{\boxed{3}}}", "3", "boxes that wrap only a box"),
    (r"\boxed{\boxed{1}+2}", r"\boxed{1}+2", "a box with more than a box in it stays as it is"),
    (r"\boxed{1 \boxed{2}", "2", "the first one that is balanced"),
    (r"\boxed{\{1\}}", r"\{1\}", "escaped braces are no braces"),
    (r"\boxed{1\}", None, "an escaped brace closes nothing"),
    (r"\boxed{1", None, "unclosed"),
    (r"\boxed{1} \boxed{2", "1", "unclosed after another"),
    (r"}}\boxed{1}", "1", "stray closing braces"),
    (r"\fbox{1} {2}", None, "other commands and bare braces"),
    (r"\boxed{}", "", "empty"),
    ("", None, "nothing"),
]


@pytest.mark.parametrize(("text", "inside", "reason"), BOXES, ids=[row[2] for row in BOXES])
def test_boxed(text: str, inside: str | None, reason: str) -> None:
    assert boxed(text) == inside, reason


def test_only_the_end_of_a_long_completion_is_read() -> None:
    thinking = "<think>" + "x" * (20 * MAX_CHARACTERS) + "</think>"
    assert submission(thinking + "<answer>7</answer>" + " " * MAX_CHARACTERS) == Submission("7", True)
    assert submission("<answer>7</answer>" + "x" * MAX_CHARACTERS).tagged is False


def test_ten_thousand_nested_boxes_are_undone_in_one_pass() -> None:
    depth = MAX_CHARACTERS // 10
    assert boxed(r"\boxed{" * depth + "3" + "}" * depth) == "3"


def test_operator_spellings() -> None:
    assert plain_operators(r"3\times5 \cdot 2 \div 1") == "3*5 * 2 / 1"
    assert plain_operators("3\u00d75\u00f72") == "3*5/2"
    assert plain_operators("10\u22123\u20132 \uff0b(4\u00b75)\u22c56\u20447") == "10-3-2 +(4*5)*6/7"
    assert plain_operators(r"$\left(3+5\right)*2 = 16$.").split() == ["(3+5", ")*2", "=", "16"]
    assert plain_operators("3 x 5 X(2)") == "3*5*(2)"
    assert plain_operators(r"x\leftarrow 1$2") == r"x\leftarrow 1 2", "nothing is joined"
    assert plain_operators(r"\frac{1}{2}") == r"\frac{1}{2}", "other LaTeX is left alone"


def test_shorten_bounds_what_error_messages_quote() -> None:
    assert shorten("abc") == "'abc'"
    assert len(shorten("a" * 10**6)) <= 64
    assert len(shorten(list(range(1000)))) <= 64
