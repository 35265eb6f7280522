"""docs/troubleshooting.md quotes what the program says: each line is in the code. The control: one that isn't."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"
SHORTEST = 4
"""Characters of a fragment between two gaps that is looked for."""


def literals(source: str) -> Iterator[str]:
    """The texts of a module, with a gap for each value that is put in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def said() -> list[str]:
    """All that the program may say: every text of its modules."""
    folders = ("learner", "rollout", "rewards", "services")
    modules = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]

    texts = [text for path in modules for text in literals(path.read_text(encoding="utf-8"))]
    return [text for text in texts if len(text) > 12]


def is_said(quote: str, texts: list[str]) -> bool:
    """Whether one text holds all fragments of the quote, in their order."""
    fragments = [part for part in quote.split(GAP) if len(part.strip()) >= SHORTEST]
    in_order = re.compile(".*?".join(map(re.escape, fragments)), re.DOTALL)
    return bool(fragments) and any(fragments[0] in text and in_order.search(text) for text in texts)


def test_what_is_quoted_is_said() -> None:
    quotes = re.findall(r"^> `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    texts = said()
    assert len(quotes) > 30
    assert [quote for quote in quotes if not is_said(quote, texts)] == []
    assert not is_said("run directory … is there already: take another", texts), "the control"
    assert not is_said("…", texts), "a quote of gaps alone says nothing"
