"""The denoising loop's heads over vLLM: one whose logits come back, one that draws in vLLM's worker.

Shapes: R rows, N asked positions, L tokens of a sequence, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rollout.engines.vllm.wire import KEY, RowAnswer, RowAsked, joined, part
from rollout.sampling.head import Asked, Drawn, Fill, Filled, Look, Rows
from rollout.trajectory import SamplerSpec

Encode = Callable[[Sequence[list[int]], Sequence[dict[str, Any]]], list[torch.Tensor]]
"""(token ids of each sequence, what its pooler is to know) -> what it returned for each."""


def encoder(llm: Any, lora_request: Callable[[], Any]) -> Encode:
    """By vLLM's own batching. ``lora_request``: called at each step, for the adapter to compute with or None."""
    from vllm import PoolingParams

    def encode(sequences: Sequence[list[int]], known: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
        outputs = llm.encode(
            [{"prompt_token_ids": ids} for ids in sequences],
            [PoolingParams(task="token_classify", use_activation=False, extra_kwargs=own or None) for own in known],
            pooling_task="token_classify",
            lora_request=lora_request(),
            use_tqdm=False,
        )
        return [output.outputs.data for output in outputs]

    return encode


def whole_sequences(encode: Encode, device: torch.device) -> Callable[[Rows, Asked], torch.Tensor]:
    """For ``LogitsHead``: the asked rows of the logits [L, V] that vLLM returns of each sequence."""

    def logits(rows: Rows, asked: Asked) -> torch.Tensor:
        sequences = _sequences(rows)
        of_rows = encode(sequences, [{}] * len(sequences))
        offsets_R = np.cumsum([0, *map(len, sequences)])[:-1] - rows.pads_R
        index = torch.from_numpy(offsets_R[asked.row_N] + rows.column_RC[asked.row_N, asked.position_N])
        return torch.cat(of_rows)[index].to(device)

    return logits


class WorkerHead:
    """A head whose laws and draws stay in vLLM's worker.

    Args:
        logit_shift: ``PolicyAdapter.logit_shift``.
        adapter: called at each step: vLLM's number of the adapter that rows must be computed with; 0 for none.
    """

    def __init__(self, encode: Encode, logit_shift: int, adapter: Callable[[], int]) -> None:
        self._encode, self._shift, self._adapter = encode, logit_shift, adapter

    def look(self, rows: Rows, asked: Asked, fills: Sequence[Fill], sampler: SamplerSpec) -> Look:
        sequences = _sequences(rows)
        questions = []
        for r in range(len(sequences)):
            own = tuple(fill for fill in fills if fill.row == r)
            position_N = asked.position_N[asked.row_N == r]
            position_M = np.concatenate([position_N, *(fill.position_B for fill in own)])
            questions.append(
                RowAsked(
                    sampler=sampler,
                    key=int(rows.keys_R[r]),
                    step=int(rows.steps_R[r]),
                    position_N=position_N,
                    token_M=rows.column_RC[r, position_M] - rows.pads_R[r] - self._shift,
                    fills=own,
                )
            )
        packed = self._encode(sequences, [{KEY: question.plain()} for question in questions])
        answers = [RowAnswer.unpack(answer, asked) for answer, asked in zip(packed, questions, strict=True)]
        used, wanted = {answer.adapter for answer in answers}, self._adapter()
        assert used == {wanted}, f"vLLM computed rows with the adapters {used}, and was asked for {wanted}"
        return _WorkerLook(answers)


class _WorkerLook:
    def __init__(self, answers: Sequence[RowAnswer]) -> None:
        self._answers = answers
        self.fills: Sequence[Filled] = [filled for answer in answers for filled in answer.fills]

    def confidence(self) -> torch.Tensor:
        known = [answer.confidence_N for answer in self._answers if answer.confidence_N is not None]
        return torch.from_numpy(np.concatenate(known))

    def draw(self, at_N: np.ndarray | None = None) -> Drawn:
        drawn = joined([answer.drawn for answer in self._answers])
        return drawn if at_N is None else part(drawn, at_N)


def _sequences(rows: Rows) -> list[list[int]]:
    """Token ids of each row, without pads."""
    return [ids[pads:].tolist() for ids, pads in zip(rows.ids_RL, rows.pads_R, strict=True)]
