r"""Finds the answer of a mathematical completion: boxes, ``####``, "The answer is 42." Total and linear in the text.

Thinking, answer tags and boxes that are damaged or cut off are those of ``rewards.parsing``; an ``<answer>`` that was
not closed counts here too. In what they leave:

1. The *last* filled ``\boxed{...}`` is the answer: solutions box what they end with. Boxes that only commas, "and" or
   "or" part are one answer of several values: ``\boxed{2} or \boxed{3}`` is the list 2, 3, and no right answer to 3
   (unless each of them is right: ``\boxed{1/2} or \boxed{0.5}``). After a box that was cut off nothing else counts.
2. Without a box: what follows the last ``####``, else the last "answer is", "answer:", to the end of the line or
   sentence. A mark with neither number nor formula behind it ("the answer is correct") does not replace one that has.
3. Without that: the text, when it is the answer itself. In a tag, or in a last sentence that concludes ("So ...",
   "Therefore ...") or is complete, the number counts that is the only one there or that ends a calculation
   (``6 * 7 = 42``), or the only formula. A last sentence without an end may be one that was cut off.

GSM8K's calculator notes (``<<6*7=42>>``), which models copy, are taken out first.

``\boxed 9`` is a box. No number is taken from a text that denies or bounds it ("not 5", "more than 5", "5 or 6").
"""

import re
from typing import NamedTuple

from rewards.parsing import Region, answer_region, boxes, readable

MAX_ANSWER = 1000

_CALCULATOR_NOTE = re.compile(r"<<[^<>\n]{0,100}>>")
_BETWEEN = re.compile(r"(?:[\s,;$.]|\\[()\[\],;! ]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b){0,20}")
_MARK = re.compile(
    r"####|\b(?:final\s+)?(?:answer|answers|result)(?:\s+to\s+(?:the|this)\s+(?:problem|question))?"
    r"\**\s*(?:\bis\b|\bare\b|\bwas\b|:|=)",
    re.IGNORECASE | re.ASCII,
)
_SAYS_SOMETHING = re.compile(r"[0-9$\\]")
_RETRACTION = re.compile(r"\W{0,5}(?:(?:in|not )correct|wrong|not right)\b", re.IGNORECASE | re.ASCII)
_SENTENCE_END = re.compile(r"(?<!\\)[.!?](?=[\s*]|$)")
_UNBRACED_BOX = re.compile(r"\\boxed\s+(-?[0-9A-Za-z.]{1,60})")
_CONCLUSION = re.compile(
    r"\W{0,5}(?:so|therefore|thus|hence|in total|in conclusion|finally|as a result)\b", re.I | re.ASCII
)
_NUMBER = re.compile(
    r"(?<![\w.\\^_{/])(?:-\s?)?(?:\\?\$\s?)?-?(?:[0-9]{1,3}(?:,(?:\\!)?[0-9]{3})+|[0-9]+)?(?:\.[0-9]+|(?<=[0-9]))(?![0-9])"
    r"(?:\s?\\?%)?"
)
_NO_STATEMENT = re.compile(
    r"\b(?:not|never|neither|either|between|cannot|unknown|or)\b|n't\b|"
    r"\b(?:more|less|greater|fewer|least|most|over|under)\s+(?:than\s+)?\\?\$?[0-9]",
    re.IGNORECASE | re.ASCII,
)
_FORMULA = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$|\\\(([^$]+?)\\\)")
_DIGIT = re.compile(r"[0-9]")
_VARIABLE = re.compile(r"(?<![A-Za-z'])[A-Za-z](?![A-Za-z'])")
_FACTORS_X = re.compile(r"(?<=[0-9)]) [xX] (?=[0-9(])")
_AFTER = re.compile(
    r"\s(?:because|since|as|which|so|where|when|for|after|if)\b|[,;]\s+(?!and\b|or\b)[A-Za-z]|\s\(|\s[-=]>\s"
)


class FinalAnswer(NamedTuple):
    """What to compare: readings of the answer in order of preference, one of which must be right; or, where several
    boxes end the text, also ``boxes`` that must all be right. ``tagged``: it stood in a complete answer tag."""

    candidates: tuple[str, ...]
    boxes: tuple[str, ...]
    tagged: bool


def final_answer(completion: str) -> FinalAnswer:
    """The answer that a completion gives; no candidates when there is none."""
    text = readable(completion)
    region = answer_region(_CALCULATOR_NOTE.sub("", text) if "<<" in text else text)
    found = _boxed(region)
    if found is None:
        return FinalAnswer((), (), region.tagged)
    if found:
        readings = found if len(found) == 1 else [", ".join(found)]
    else:
        readings = _marked(region.text) or _bare(region.text.strip(), region.begun)
    candidates = dict.fromkeys(_factors(answer) for answer in readings if answer and len(answer) <= MAX_ANSWER)
    return FinalAnswer(tuple(candidates), tuple(found) if len(found) > 1 else (), region.tagged)


def _boxed(region: Region) -> list[str] | None:
    """The last filled box, and those that only commas and the like part from it. None when the last was cut off."""
    text, found = region.text, boxes(region.text)
    if not found:
        return _UNBRACED_BOX.findall(text)[-1:] if r"\boxed" in text else []
    if not found[-1].closed and not region.ended:
        return None
    filled = [(box, text[box.start : box.end].strip()) for box in found if text[box.start : box.end].strip()]
    if not filled:
        return _UNBRACED_BOX.findall(text)[-1:]
    values = [filled[-1][1]]
    for (box, value), (later, _) in zip(filled[-2::-1], filled[:0:-1], strict=True):
        between = text[box.end + 1 : later.begin]
        if len(between) > 60 or len(values) > 20 or not _BETWEEN.fullmatch(between):
            break
        values.insert(0, value)
    return values[:1] if len(set(values)) == 1 else values


def _marked(text: str) -> list[str]:
    """Readings of what follows the mark that counts, then of words behind a later one."""
    marks = [(mark.group() == "####", _line_after(text, mark.end())) for mark in _MARK.finditer(text)]
    found = [(hashes, line) for hashes, line in marks if line]
    telling = [(hashes, line) for hashes, line in found if _SAYS_SOMETHING.search(line)]
    if not found or telling and _RETRACTION.match(found[-1][1]):
        return []
    best = next((line for hashes, line in reversed(telling) if hashes), telling[-1][1] if telling else "")
    last = found[-1][1]
    return (_readings(best) if best else []) + ([] if _SAYS_SOMETHING.search(last) else _readings(last))


def _line_after(text: str, start: int) -> str:
    rest = text[start : start + MAX_ANSWER].lstrip(" \t:*=")
    return next((line.strip() for line in rest.split("\n", 3)[:3] if line.strip(" \t*$\\[]():")), "")


def _factors(answer: str) -> str:
    """``5 x 4 = 20`` with a sign for the x."""
    return _FACTORS_X.sub(" * ", answer) if "=" in answer else answer


def _bare(text: str, in_tag: bool) -> list[str]:
    """Readings of a text that is the answer itself, or of the number in it or in its conclusion."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return []
    readings = [_undecorated(text)] if len(lines) == 1 or len(text) <= 200 else []
    sentence = text if in_tag else _last_sentence(lines[-1])
    return readings + (_statement(sentence) if in_tag or _concludes(sentence) else [])


def _readings(line: str) -> list[str]:
    """The line as an answer, cut before its second sentence and before an explanation, or its only number."""
    sentence = line
    if end := _SENTENCE_END.search(line):
        sentence = line[: end.start()]
    short = _AFTER.split(sentence, maxsplit=1)[0]
    return [_undecorated(sentence), _undecorated(short), *_statement(short)]


def _concludes(sentence: str) -> bool:
    """Whether the last sentence of a text says what all before came to: by its first word, or by being whole."""
    return _CONCLUSION.match(sentence) is not None or sentence.rstrip("*").endswith((".", "!"))


def _last_sentence(text: str) -> str:
    text = text.strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text[:-1])]
    return text[ends[-1] :].strip() if ends else text


def _statement(text: str) -> list[str]:
    """Readings of a sentence: its only number, the only formula with all its numbers, or what a calculation gives."""
    if _NO_STATEMENT.search(text[:MAX_ANSWER]):
        return []
    formulas = [match for match in _FORMULA.finditer(text[:MAX_ANSWER])]
    if len(formulas) == 1 and not _DIGIT.search(text.replace(formulas[0].group(), "", 1)):
        return [next(part for part in formulas[0].groups() if part)]
    calculation, equals, value = _factors(text[:MAX_ANSWER]).rpartition("=")
    if equals and not _VARIABLE.search(calculation):
        return _only_number(value)
    return _only_number(text)


def _only_number(text: str) -> list[str]:
    numbers = {match.group().strip() for match in _NUMBER.finditer(text[:MAX_ANSWER])} - {""}
    digits = sum(character.isdigit() for character in text)
    only = next(iter(numbers)) if len(numbers) == 1 else ""
    return [only] if only and sum(map(str.isdigit, only)) == digits else []


def _undecorated(text: str) -> str:
    return text.strip().strip("*").strip().removesuffix(".")
