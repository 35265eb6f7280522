"""Which completion tokens of a demonstration are masked, with which weight, and how many EOS follow its end.

The loss of an example whose completion (EOS included) has C tokens is an estimate of minus its ELBO, the mean
log-likelihood over all orders of revealing one token at a time (``learner.small_base.base_model.elbo_weights`` has the
argument):

count   n uniform on {1, ..., C}, n positions masked, each weighted C/n. Unbiased; every draw masks something, and the
        weights of a draw add up to C whatever n is.
rate    t uniform on (0.001, 1), each position masked with probability t, each weighted 1/t. What LLaDA and d1 publish
        (p_mask and t in their code). The same expectation up to the cut at 0.001; the weights of a draw add up to C
        only on average, and a short completion is often not masked at all.

``sft.normaliser`` divides. By example: the mean over an update's examples of loss / C, so that a short answer counts as
much as a long trace. That is LLaDA's published form (answer_lengths), and d1's with its one example per device; larger
micro-batches of d1's code weigh examples by their length, and differently on every layout. By token: the sum of losses
over the sum of C, the likelihood of the corpus per token. Both divide over the whole update, whatever the ranks.

EOS: behind a completion that was not cut stand from 1 to ``sft.eos_tokens`` EOS, a number drawn per example and epoch;
they are masked, weighted and counted like other tokens. The model has to learn to fill what is left of a completion
with EOS, and that the number of masks doesn't give the answer's length away. Published code fills up to the maximum
length instead (null), so that most targets are EOS wherever answers are short.

All draws come from a stream named by run seed, purpose, epoch and example: neither the place of an example in a row,
nor the rank, nor what it is packed with changes them.
"""

from dataclasses import dataclass

import numpy as np

from learner.finetuning.data import Example
from learner.finetuning.settings import SftSection
from rollout.seeds import numpy_generator

SMALLEST_RATE = 1e-3


@dataclass(frozen=True)
class NoisedExample:
    """An example with its EOS, noised; what a model is asked to restore."""

    prompt_ids: np.ndarray
    """[P] int32."""
    completion_ids: np.ndarray
    """[C] int32, EOS included."""
    masked: np.ndarray
    """[C] bool."""
    weight: float
    """Of each masked token's log-likelihood: C/n or 1/t."""
    eos: int
    """How many EOS were put behind the completion."""

    @property
    def length(self) -> int:
        return self.prompt_ids.size + self.completion_ids.size


def noised(
    example: Example, sft: SftSection, *, seed: int, epoch: int, eos_token_id: int, longest: int
) -> NoisedExample:
    """The example as epoch ``epoch`` of the run with this seed shows it, of ``longest`` tokens at most."""
    rng = numpy_generator(seed, "sft", "train", epoch, example.id)
    return _noised(example, sft, rng, eos_token_id, longest, stratum=0, strata=1)


def held_out_draws(
    example: Example, sft: SftSection, *, seed: int, eos_token_id: int, longest: int
) -> list[NoisedExample]:
    """``sft.held_out_draws`` fixed noisings of the example, whose rates are spread evenly (one from each stratum)."""
    strata = sft.held_out_draws
    return [
        _noised(
            example,
            sft,
            numpy_generator(seed, "sft", "held out", draw, example.id),
            eos_token_id,
            longest,
            stratum=draw,
            strata=strata,
        )
        for draw in range(strata)
    ]


def _noised(
    example: Example,
    sft: SftSection,
    rng: np.random.Generator,
    eos_token_id: int,
    longest: int,
    *,
    stratum: int,
    strata: int,
) -> NoisedExample:
    room = longest - example.length
    wanted = room if sft.eos_tokens is None else int(rng.integers(1, sft.eos_tokens + 1))
    eos = min(wanted, room) if example.ended else 0
    completion_C = np.concatenate([example.completion_ids, np.full(eos, eos_token_id, dtype=np.int32)])
    C = completion_C.size
    u = (stratum + rng.random()) / strata
    if sft.masking == "count":
        n = 1 + min(int(u * C), C - 1)
        masked_C = rng.random(C).argsort(kind="stable").argsort(kind="stable") < n
        weight = C / n
    else:
        rate = SMALLEST_RATE + (1 - SMALLEST_RATE) * u
        masked_C = rng.random(C) < rate
        weight = 1 / rate
    return NoisedExample(example.prompt_ids, completion_C, masked_C, weight, eos)
