r"""Multiple choice: options shown with letters, of which a completion names one, by its letter or by its text.

Reward components: GSM8K's (``rewards.tasks.gsm8k``), ``think_tag`` 0.5, ``answer_tag`` 0.5, ``correct`` 3.0.

The answer is that of ``rewards.parsing`` (the last tag, a box in it). Without a tag it is the text when that is nothing
but the answer, else what follows the last "the answer is". How an answer is read:

- A letter in either case, alone, in brackets or with a full stop, also after "the answer is" or "option".
- The text of an option, whole: case, punctuation, spaces and an article before it don't count, but signs do where they
  alone tell options apart (3 and -3). A text that two options share names neither.
- A letter and the text of its option. With another option's text they contradict each other, and nothing is named.
- Where the answer is tagged or marked, an explanation may follow, set off by a full stop, a colon, a bracket or
  "because". When it names another option, by letter or by text, or takes the answer back, nothing is named.
- "A bank" is an article and a word, not the letter A.
"""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rewards.errors import DataError
from rewards.layout import Layout, answer_line
from rewards.parsing import MAX_CHARACTERS, has_thinking, shorten, submission
from rewards.task import Grade
from rewards.tasks.hub import DataTask

SYSTEM_PROMPT = (
    "Choose the right option. Put your reasoning inside <think> and </think>, then give the letter of your choice "
    "inside <answer> and </answer>, with nothing else in the tag."
)
LETTERS = tuple(string.ascii_uppercase)
"""Of the options, in order."""

_MAX_ANSWER = 2000
_MARKS_READ = 3
_DRESS = re.compile(r"[*`${}\"\u201c\u201d]|\\(?:text|textbf|mathrm|mathbf)(?=\{)")
_MARK = re.compile(r"\b(?:answer|option|choice|ending)(?:[ \t]{1,9}is\b:?|[ \t]{0,9}:)", re.IGNORECASE | re.ASCII)
_LEAD = re.compile(
    r"(?:(?:the|my)\s)?(?:(?:final|best|correct|right)\s){0,2}(?:answer|option|choice|ending)\b\s?(?:is\b:?|:)?\s?"
    r"(?:(?:the\s)?(?:option|choice|ending|letter)\b\s?:?\s?)?",
    re.IGNORECASE | re.ASCII,
)
_LETTER = re.compile(
    r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])(?![\w'\u2019]|\.[A-Za-z](?:\.|$)))"  # A.B. is no letter
    r"(\s?[.:),\u2013\u2014-])?\s?",
    re.ASCII,
)
_REASON = re.compile(r"\s?(?:because|since)\b", re.IGNORECASE)
_CONFIRMED = re.compile(
    r"(?:is\s)?(?:the\s)?(?:correct|right|best)(?:\s(?:answer|option|choice|one))?\b", re.IGNORECASE
)
_TAKEN_BACK = re.compile(
    r"\b(?:is|was)\s(?:wrong|incorrect|false)\b|(?:\bnot|n['\u2019]t)\s(?:the\s)?(?:correct|right|best|answer)\b",
    re.IGNORECASE,
)
_OTHER = re.compile(r"(?<![\w'\u2019])(?<!\w\.)([A-Za-z])(?![\w'\u2019]|\.\w)", re.ASCII)
_ARTICLE_OR_PRONOUN = re.compile(r"[AaIi] [a-z]", re.ASCII)
_ARTICLE = re.compile(r"(?:an?|the)\s", re.IGNORECASE | re.ASCII)
_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


class MultipleChoice(DataTask):
    """Fields: ``question``, ``options`` (2 to 26 texts) and ``answer``, the letter of the right one."""

    components: ClassVar[tuple[str, ...]] = ("think_tag", "answer_tag", "correct")
    largest: ClassVar[Mapping[str, float]] = {"think_tag": 0.5, "answer_tag": 0.5, "correct": 3.0}

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, fields["options"], strict=False))
        return [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": f"{fields['question']}\n\n{options}"},
        ]

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        self.validate_fields(fields)
        answer = submission(completion)
        error = _fault(answer.text, fields["options"], fields["answer"], tagged=answer.tagged)
        components = {
            "think_tag": 0.5 * has_thinking(completion[-MAX_CHARACTERS:]),
            "answer_tag": 0.5 * answer.tagged,
            "correct": 3.0 * (error is None),
        }
        return Grade(error is None, components, error)

    def validate_fields(self, fields: dict[str, Any]) -> None:
        options, answer = fields.get("options"), fields.get("answer")
        if not isinstance(options, list | tuple) or not 2 <= len(options) <= len(LETTERS):
            raise DataError(f"options must be a list of 2 to {len(LETTERS)} texts, not {shorten(options)}")
        for option in options:
            if not isinstance(option, str) or not option.strip():
                raise DataError(f"each of the options must be a text, not {shorten(option)}")
        if answer not in LETTERS[: len(options)]:
            raise DataError(f"answer must be a letter from A to {LETTERS[len(options) - 1]}, not {shorten(answer)}")

    def expected(self, fields: dict[str, Any]) -> str:
        answer = fields["answer"]
        return f"{answer}. {fields['options'][LETTERS.index(answer)]}"

    def layout(self, fields: dict[str, Any], completion: str, *, correct: bool) -> Layout | None:
        """The answer in the tag."""
        answer = submission(completion)
        return answer_line(answer.text, completion, correct=correct) if answer.tagged else None

    def leak_key(self, fields: dict[str, Any]) -> str:
        """The question without case, spaces and punctuation."""
        return "".join(_WORD.findall(fields["question"].casefold()))

    def _checked(self, fields: dict[str, Any]) -> dict[str, Any]:
        question = fields["question"]
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"the question must be a text, not {shorten(question)}")
        self.validate_fields(fields)
        return fields


def _fault(text: str, options: Sequence[str], gold: str, *, tagged: bool) -> str | None:
    """Why the answer is not right; None when it is."""
    if not text:
        return "there is no answer"
    found = chosen(text, options, tagged=tagged)
    if found is None:
        return f"the answer {shorten(text)} names no option, or more than one"
    return None if LETTERS[found] == gold else f"the answer is {LETTERS[found]}, not {gold}"


def chosen(text: str, options: Sequence[str], *, tagged: bool) -> int | None:
    """The number of the option, from 0, that an answer names; None when it names none, or more than one."""
    text = _DRESS.sub("", text)
    marks = [] if tagged else list(_MARK.finditer(text))
    if not marks:
        return _read(text, options, explained=tagged)
    for mark in marks[: -_MARKS_READ - 1 : -1]:
        rest = text[mark.end() : mark.end() + _MAX_ANSWER].splitlines()
        line = next((line for line in rest if line.strip()), "")
        if line and not _CONFIRMED.fullmatch(line.strip(" .!")):
            return _read(line, options, explained=True)
    return None


def _read(statement: str, options: Sequence[str], *, explained: bool) -> int | None:
    """``explained``: an explanation may follow."""
    if len(statement) > _MAX_ANSWER:
        return None
    statement = " ".join(statement.split()).rstrip(" !")
    without_lead = _LEAD.sub("", statement, count=1) if _LEAD.match(statement) else statement
    for text in dict.fromkeys((statement, without_lead)):
        letter = _LETTER.match(text)
        number = None if letter is None else _number(letter, options)
        if letter is not None and number is not None and letter.end() == len(text):
            return number  # even where this letter is the text of another option
        if (named := _by_text(text, options)) is not None:
            return named
        if letter is not None and number is not None:
            found = _with_rest(letter, text[letter.end() :], number, options, explained=explained)
            if found is not None or not _ARTICLE.match(text):
                return found
        if explained and (end := _REASON.search(text) or _SENTENCE_END.search(text)):
            named = _by_text(text[: end.start()], options)
            if named is not None and _explains(text[end.end() :], named, options):
                return named
    return None


def _number(letter: re.Match[str], options: Sequence[str]) -> int | None:
    number = LETTERS.index((letter[1] or letter[2] or letter[3]).upper())
    return number if number < len(options) else None


def _with_rest(letter: re.Match[str], rest: str, number: int, options: Sequence[str], *, explained: bool) -> int | None:
    """The option of a letter that more follows."""
    if plain(rest) == plain(options[number]):
        return number if _by_text(rest, options) in (number, None) else None
    if not explained:
        return None
    mark, bracketed = (letter[4] or "").strip(), letter[3] is None
    apart = bracketed or mark not in ("", ",") or _REASON.match(rest) or (not mark and _CONFIRMED.match(rest))
    return number if apart and _explains(rest, number, options) else None


def _explains(rest: str, number: int, options: Sequence[str]) -> bool:
    """Whether a text behind an answer leaves it standing and names no other option."""
    if _TAKEN_BACK.search(rest):
        return False
    for other in _OTHER.finditer(rest):
        index = LETTERS.index(other[1].upper())
        if index not in (number, *range(len(options), len(LETTERS))) and not _ARTICLE_OR_PRONOUN.match(
            rest, other.start()
        ):
            return False
    said, own = plain(rest), plain(options[number])
    others = [plain(option) for i, option in enumerate(options) if i != number]
    return not any(_says(re.sub(_phrase(own), "", said) if _says(own, other) else said, other) for other in others)


def _says(text: str, words: str) -> bool:
    return re.search(_phrase(words), text) is not None


def _phrase(words: str) -> str:
    return rf"(?<!\w){re.escape(words)}(?!\w)"


def _by_text(text: str, options: Sequence[str]) -> int | None:
    for form in (_signed, plain):  # signs tell -3 from 3, and C++ from C, where they are all that does
        found = [number for number, option in enumerate(options) if form(option) == form(text)]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def _signed(text: str) -> str:
    """In lower case, without an article before it and a full stop behind it."""
    text = text.strip().casefold()
    return " ".join((_ARTICLE.sub("", text, count=1) if _ARTICLE.match(text) else text).rstrip(".").split())


def plain(text: str) -> str:
    """Words alone, in lower case, without an article before them; what has no word, as it is."""
    return " ".join(_WORD.findall(_signed(text))) or text.strip().casefold()
