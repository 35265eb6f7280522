"""How natural completions are to the base without adapter: the mean log-prob of their tokens, each from all others
(``learner.likelihood.pseudo``), and that of what stood in the gaps, where the task knows it.

Measured in this process, on a GPU where torch sees one. Shapes: N problems.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from learner.evaluation.cells import Cell
from learner.evaluation.results import Chunk
from learner.evaluation.settings import EvaluateConfig
from learner.likelihood.pseudo import pseudo_logp
from rewards.infill import contents
from rewards.task import InfillTask, Problem, get_task
from rollout.models.encoding import encode, encode_text, load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model


class Naturalness:
    """The base, with what it has said of texts so far."""

    def __init__(self, config: EvaluateConfig, model_path: str, problems: Sequence[Problem]) -> None:
        self._count = config.statistics.naturalness
        self._task, self._problems = get_task(config.task.name), problems
        self._family = policy_adapter(model_path)
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(model_path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(
            model_path, config.learner.dtype, quantization=config.model.quantization, device=device
        )
        self._prompts = [encode(self._tokenizer, self._task.prompt(problem.fields)) for problem in problems]
        self._said: dict[tuple[int, tuple[str, ...]], float] = {}

    def of_completions(
        self, evaluated: Mapping[tuple[Cell, str], Sequence[Chunk]]
    ) -> dict[tuple[Cell, str], np.ndarray]:
        """[N] float64 for each pair, in nats a token: the mean over the problem's first completions."""
        found = {}
        for pair, chunks in evaluated.items():
            texts = [problem["completions"][: self._count] for chunk in chunks for problem in chunk.problems]
            found[pair] = np.array([self._mean(at, of_problem) for at, of_problem in enumerate(texts)])
            print(f"naturalness of {pair[1]}, {pair[0].label}: {found[pair].mean():.3f} nats a token", flush=True)
        return found

    def of_originals(self) -> float | None:
        """The mean over the problems, in nats a token, of what stood in the gaps; None where the task doesn't know."""
        if not isinstance(self._task, InfillTask):
            return None
        texts = [self._task.original(problem.fields) for problem in self._problems]
        known = [self._of(at, tuple(text)) for at, text in enumerate(texts) if text is not None]
        return float(np.mean(known)) if known else None

    def _mean(self, at: int, completions: Sequence[str]) -> float:
        parts = contents if self._prompts[at].gaps else lambda text: [text]
        return float(np.mean([self._of(at, tuple(parts(text))) for text in completions]))

    def _of(self, at: int, texts: tuple[str, ...]) -> float:
        """A text without tokens is as unnatural as can be told: a uniform law's log-prob."""
        if (at, texts) not in self._said:
            tokens = [encode_text(self._tokenizer, text) for text in texts]
            logp_c = pseudo_logp(self._model, self._family, self._prompts[at], tokens)
            self._said[at, texts] = float(logp_c.mean()) if logp_c.size else -float(np.log(len(self._tokenizer)))
        return self._said[at, texts]
