"""Completions at the terminal while they are unmasked: redrawn in place, or, where nobody can redraw, a line a step."""

import sys
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rollout.models.encoding import context_texts
from rollout.trajectory import SamplerSpec

STEP_S, ALL_STEPS_S = 0.15, 3.0
"""How long a step stays on the screen at least, and all of them together: a small model is done before one can look."""


class Unmasking:
    """A context in which ``step`` shows what each step has revealed. Special tokens are shown as nothing.

    Args:
        samples: completions that are written together.
        places: of a prompt with gaps, where each sample's positions stand (``rollout.spans``).
        prompt: such a prompt's token ids; its text is shown around the gaps.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        samples: int,
        sampler: SamplerSpec,
        *,
        places: Sequence[np.ndarray] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._steps = [0] * samples
        self._last = None if sampler.threshold is not None else sampler.steps
        self._before = np.ones((samples, sampler.completion_length), dtype=bool)
        self._there = [place_C >= 0 for place_C in places]
        self._around = [context_texts(tokenizer, prompt, place_C) for place_C in places]
        self._texts = [Text("") for _ in range(samples)]
        self._mask = "░" if "utf" in (sys.stdout.encoding or "").lower() else "_"
        console = Console(highlight=False)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Unmasking":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, sample: int, ids: np.ndarray, masked: np.ndarray) -> None:
        """See ``rollout.sampling.denoise.denoise``."""
        self._steps[sample] += 1
        fresh = self._before[sample] & ~masked
        self._before[sample] = masked
        self._show(sample, self._text(sample, ids, masked, fresh))

    def finished(self, completion_ids: np.ndarray) -> None:
        """Show the completions, [samples, C], as they are in the end."""
        if self._live is None:
            return
        nothing = np.zeros(completion_ids.shape[1], dtype=bool)
        self._texts = [self._text(sample, ids, nothing, nothing) for sample, ids in enumerate(completion_ids)]
        self._live.update(Group(*self._texts), refresh=True)

    def print_texts(self, texts: Sequence[str]) -> None:
        """The finished texts, where they aren't on the screen already."""
        if self._live is None:
            for text in texts:
                print(f"\n{_writable(printable(text))}", flush=True)

    def _show(self, sample: int, text: Text) -> None:
        if self._live is not None:
            self._texts[sample] = text
            self._live.update(Group(*self._texts), refresh=True)
            time.sleep(min(STEP_S, ALL_STEPS_S / (self._last or self._before.shape[1])) / len(self._steps))
            return
        which = f"{sample + 1}: " if len(self._steps) > 1 else ""
        of_all = "" if self._last is None else f"/{self._last}"
        print(f"{which}step {self._steps[sample]}{of_all}  {_writable(text.plain)}".replace("\n", "\\n"), flush=True)

    def _text(self, sample: int, ids: np.ndarray, masked: np.ndarray, fresh: np.ndarray) -> Text:
        """Masked places as blocks, what this step has revealed in bold, the text around gaps dimmed."""
        text = Text()
        around = list(self._around[sample]) if self._around else []
        there = np.flatnonzero(self._there[sample]) if self._there else np.arange(ids.size)
        for number, (token, hidden, new) in enumerate(
            zip(ids[there].tolist(), masked[there], fresh[there], strict=True)
        ):
            while around and around[0][0] <= number:
                text.append(printable(around.pop(0)[1]), style="dim")
            if hidden:
                text.append(self._mask, style="dim")
            elif token not in self._special:
                text.append(printable(str(self._tokenizer.decode([token]))), style="bold green" if new else "")
        for _, piece in around:
            text.append(printable(piece), style="dim")
        return text


def printable(text: str) -> str:
    """The text with what would command the terminal, such as its escape character, written as in Python."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else repr(c)[1:-1] for c in text)


def _writable(text: str) -> str:
    """With escapes for what standard output's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
