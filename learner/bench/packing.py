"""Packed rows against padded ones in supervised fine-tuning: tokens of demonstrations learned per second.

python -m learner.bench.packing [--small]

One update's forwards and backwards of the same examples in three layouts, taken in turns: packed; padded to the longest
of the forward, the rows sorted by length; and filled with EOS to the longest row, as published. Counted are the tokens
of prompt and answer, which are the same in all three; EOS and pads are work, not tokens.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from learner.bench.measure import timed
from learner.finetuning.data import Example
from learner.finetuning.noising import noised
from learner.finetuning.packing import build_tokens, plan_rows
from learner.finetuning.settings import SftSection
from learner.likelihood.scorer import restricted_logp
from learner.runs.stopping import exit_status
from rewards.command import Parser
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.seeds import numpy_generator

MASK, EOS = 1, 0


def main(argv: Sequence[str] | None = None) -> int:
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = Parser("python -m learner.bench.packing", description="Fine-tuning's layouts of examples, in turns.")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    small = parser.parse_args(argv).small
    width, layers, count, longest, repeats = (32, 1, 6, 64, 1) if small else (128, 2, 16, 512, 3)
    examples = traces(count, longest)
    config = LLaDAConfig(
        d_model=width,
        n_layers=layers,
        n_heads=4,
        mlp_hidden_size=2 * width,
        vocab_size=1000,
        max_sequence_length=longest,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    torch.set_num_threads(1)
    model = LLaDAModelLM(config).train()
    ways = {
        "packed": update(model, examples, SftSection(eos_tokens=longest // 16), longest, rows=4),
        "padded": update(model, examples, SftSection(eos_tokens=longest // 16, packing=False), longest, rows=4),
        "filled": update(model, examples, SftSection(eos_tokens=None, packing=False), longest, rows=4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    padding = {name: work() for name, work in ways.items()}  # the first time of each is not counted
    for _ in range(repeats):
        for name, work in ways.items():
            seconds[name].append(timed(work)[1].cpu)
    tokens = sum(example.length for example in examples)
    slowest = statistics.median(seconds["filled"])
    print(
        f"{count} examples of {tokens / count:.0f} tokens on average, rows of {longest}, CPU seconds, {repeats} times"
    )
    for name in ways:
        taken = statistics.median(seconds[name])
        print(f"{name}: {tokens / taken:7.0f} tokens/s, {slowest / taken:.2f} x filled, padding {padding[name]:.1%}")
    return 0


def traces(count: int, longest: int) -> list[Example]:
    """Examples whose lengths are spread as answers' are: log-normal, a quarter of the longest row in the median."""
    rng = numpy_generator(0, "bench", "packing")
    made = []
    for number in range(count):
        prompt = int(rng.integers(longest // 16, longest // 6))
        completion = int(min(longest - prompt - 2, max(2, rng.lognormal(np.log(longest / 4), 0.7))))
        ids = (rng.integers(2, 1000, size).astype(np.int32) for size in (prompt, completion))
        made.append(Example(f"e{number}", next(ids), next(ids), ended=True))
    return made


def update(
    model: LLaDAModelLM, examples: list[Example], sft: SftSection, longest: int, *, rows: int
) -> Callable[[], float]:
    """All forwards and backwards of one update; what it returns is the share of padding."""
    made = [noised(e, sft, seed=0, epoch=0, eos_token_id=EOS, longest=longest) for e in examples]
    plan = plan_rows(made, capacity=longest, packing=sft.packing, by_example=True, ranks=1, rows_per_forward=rows)

    def work() -> float:
        model.zero_grad()
        for forward in plan.forwards[0]:
            batch = build_tokens(forward, made, by_example=True, mask_id=MASK, pad_id=EOS)
            logits_NV = model(
                input_ids=torch.from_numpy(batch.input_ids),
                attention_mask=None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask),
                logit_rows=torch.from_numpy(batch.score_rows),
            ).logits
            targets_N = torch.from_numpy(batch.targets)
            law = restricted_logp(logits_NV, targets_N, None, temperature=1.0, mask_token_id=MASK)
            (-(torch.from_numpy(batch.weight).float() * law.logp_N).sum() / plan.normaliser).backward()
        return plan.statistics["padding_share"]

    return work


if __name__ == "__main__":
    sys.exit(main())
