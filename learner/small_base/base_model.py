"""The small base model: masked-diffusion training on two demonstrators' answers, cached between runs.

    python -m learner.small_base.base_model recipe=sudoku [key.sub=value ...]

It is taught by two demonstrators, of whom one is wrong (``rewards.task.Task.demonstrations``). First
(``model.base.right_first``, 70 % of the steps) it sees the *right* one alone and picks up the skill. Then right answers
become the minority (``right_fraction``, 35 %) among those of a demonstrator who follows a single *wrong rule*, always
the same one, and nothing tells the base who is who. It ends up preferring the commoner, wrong way and keeps the other
one latent; reinforcement learning has to find out which of the two is rewarded. It is a small picture of a model that
has a skill and, after training on mixed data, seldom shows it.

It only ever sees training problems. Shapes: B demonstrations of a step, P prompt tokens (padded on the left), C
completion positions, N masked positions of a step, V vocabulary.
"""

from rollout.process import prepare_process

if __name__ == "__main__":
    prepare_process()  # before torch is loaded

import contextlib
import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from learner.runs.atomic import atomic_dir, disk_errors
from learner.runs.lock import FileLock, Held
from learner.runs.stopping import exit_status
from learner.settings.command import SettingsParser
from learner.settings.run import RunConfig, help_text, load_config
from learner.settings.sections import BaseSpec
from rewards.errors import ConfigError, DataError, WaitTimeout
from rewards.task import AnswerPair, InfillTask, Problem, Task, get_task
from rollout.malloc import keep_freed_memory
from rollout.models.encoding import encode_prompt
from rollout.models.llada import LLaDAConfig, LLaDAModelLM
from rollout.models.tokenizer import build_tokenizer
from rollout.seeds import derive_seed, numpy_generator

FORMAT = 2
"""Part of the cache's key: raise it when a change here or in the tokenizer makes another base."""

THREADS = 2
"""Fixed, not the machine's number of cores: it decides the order of sums, and with it the base's bits."""

INIT_STD = 0.1
"""Standard deviation of the initial weights; at these widths the customary 0.02 learns several times slower."""

LONGEST = 512
"""Tokens of prompt and completion together."""

WARMUP_FRACTION = 0.05
SILENCE_S = 120.0
"""Without a step of the process that builds a base, until those who wait for it give it up. A step takes milliseconds;
the whole, with others on the machine, anything up to half an hour."""

logger = logging.getLogger(__name__)

BuildProgress = Callable[[int, int, float], None]
"""Called as (steps done, steps, mean loss of late in nats per token)."""


def ensure_base(config: RunConfig, cache_dir: Path, *, on_progress: BuildProgress | None = None) -> Path:
    """Folder of the base that this configuration asks for, built when ``cache_dir`` doesn't have it yet.

    The folder's name holds a hash of task, training problems, demonstrations, ``model.base`` and completion length.
    Several processes may ask at once: one builds, the others wait for it.

    Raises:
        ConfigError: when the task has no demonstrations, or a prompt or a demonstration is too long.
        DataError: when a training problem shares its solution with a held-out one.
        WaitTimeout: when another process that builds the same base has done no step for two minutes.
    """
    task, length = get_task(config.task.name), config.rollout.sampler.completion_length
    problems = _training_problems(config, task)
    path = cache_dir / _name(config, task, problems)
    if not path.is_dir():
        with _exclusive(path.with_name(f"{path.name}.lock"), silence_s=SILENCE_S) as lock:

            def progress(done: int, steps: int, loss: float) -> None:
                lock.show_life()
                if on_progress:
                    on_progress(done, steps, loss)

            if not path.is_dir():
                with atomic_dir(path) as folder:
                    train_base(config.model.base, task, problems, length, folder, on_progress=progress)
    return path


def base_name(config: RunConfig) -> str:
    """Name of the folder that ``ensure_base`` finds or makes; nothing is built. Raises ConfigError and DataError as it
    does."""
    task = get_task(config.task.name)
    return _name(config, task, _training_problems(config, task))


def train_base(
    spec: BaseSpec,
    task: Task,
    problems: Sequence[Problem],
    completion_length: int,
    out_dir: Path,
    *,
    on_progress: BuildProgress | None = None,
) -> dict[str, float]:
    """Train a base from nothing and write it to ``out_dir``: model and tokenizer in HF layout, ``sft.json``.

    The same arguments give the same bits; torch's and numpy's global generators are left as they were.

    Returns:
        parameters (count), loss (nats per completion token: minus the ELBO over C, mean of the last tenth of the
        steps), seconds.
    """
    started = time.perf_counter()
    tokenizer = build_tokenizer()
    data = _encode(task, problems, tokenizer, completion_length)
    model = _new_model(spec, tokenizer)
    keep_freed_memory()
    with _torch_threads(THREADS):
        losses = _optimize(model, data, spec, on_progress)
    metrics = {
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "loss": float(np.mean(losses[-max(1, len(losses) // 10) :])),
        "seconds": time.perf_counter() - started,
    }
    with disk_errors(out_dir):
        model.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
        about = {"task": task.name, "completion_length": completion_length, "spec": spec.model_dump(), **metrics}
        (out_dir / "sft.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return metrics


def draw_masks(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Which completion positions to mask, [rows, length] bool: per row n uniform on {1, ..., length}, then exactly n
    positions, every set of n equally likely."""
    count_B1 = rng.integers(1, length + 1, size=(rows, 1))
    rank_BC = rng.random((rows, length)).argsort(axis=1).argsort(axis=1)
    return rank_BC < count_B1


def elbo_weights(masked_BC: np.ndarray) -> np.ndarray:
    """Weight C/n of each masked token's log-probability, 0 elsewhere; [B, C] float64.

    For a completion x and n drawn uniformly from {1, ..., C}, then a set M of n masked positions,

        E[ (C/n) sum over i in M of log p(x_i | x outside M) ] = sum over n of (1/n) E_M[ sum over i in M of log p ]

    is the ELBO: the mean log-likelihood over all orders of revealing one token at a time, in which the step with n
    tokens still masked reveals each of the n with chance 1/n. The law of n and the weight belong together. With n
    uniform on {0, ..., C}, as when a mask rate is drawn from U[0, 1], the weight is (C+1)/n; C/n would then give only
    C/(C+1) of the ELBO (DMPO's code), and (C+1)/n under our law (C+1)/C of it.
    """
    length = masked_BC.shape[1]
    return masked_BC * (length / masked_BC.sum(axis=1, keepdims=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Build the base of a recipe and print its folder."""
    return exit_status(partial(_command, argv))


def _command(argv: Sequence[str] | None) -> int:
    parser = SettingsParser("python -m learner.small_base.base_model", "Build the small base of a recipe.", help_text)
    config = load_config(parser.read(argv).settings)
    print(ensure_base(config, config.model.cache_path, on_progress=print_progress))
    return 0


def print_progress(done: int, steps: int, loss: float) -> None:
    """A line on stderr every tenth of the way."""
    if done % max(1, steps // 10) == 0 or done == steps:
        print(f"base: step {done}/{steps}, loss {loss:.3f} nats per token", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _EncodedAnswers:
    """Encoded training set: n problems, answers[:, 0] wrong and answers[:, 1] right."""

    prompt_nP: np.ndarray
    real_nP: np.ndarray
    answers_n2C: np.ndarray


def _training_problems(config: RunConfig, task: Task) -> list[Problem]:
    seed, paths = config.run.seed, config.task
    train = task.problems("train", seed=seed, size=config.model.base.sft_examples, path=paths.train_path)
    test = task.problems("test", seed=seed, size=paths.test_size, path=paths.test_path)
    if task.source("train", paths.train_path) is not None:
        train = task.without_leaks(train, test)
    task.check_disjoint(train, test)
    if not train:
        source = task.source("train", paths.train_path)
        raise DataError(f"no training problem of {source} is left to build the base from")
    return train


def _name(config: RunConfig, task: Task, problems: Sequence[Problem]) -> str:
    pairs = [task.demonstrations(problem.fields) for problem in problems]
    return f"{task.name}-{_key(task, config.model.base, problems, pairs, config.rollout.sampler.completion_length)}"


def _key(
    task: Task, spec: BaseSpec, problems: Sequence[Problem], pairs: Sequence[AnswerPair], completion_length: int
) -> str:
    taught = [[problem.fields, pair.right, pair.wrong] for problem, pair in zip(problems, pairs, strict=True)]
    what = [FORMAT, task.name, spec.model_dump(), completion_length, taught]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _encode(
    task: Task, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, completion_length: int
) -> _EncodedAnswers:
    if isinstance(task, InfillTask):
        raise ConfigError(f"no base can be built for task {task.name}, whose prompts have gaps; set model.path")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = [encode_prompt(tokenizer, task.messages(problem.fields)) for problem in problems]
    width = max(map(len, prompts))
    if width + completion_length > LONGEST:
        raise ConfigError(
            f"a prompt of task {task.name} takes {width} tokens of the small base, a character each, which with "
            f"rollout.sampler.completion_length={completion_length} is more than its {LONGEST} positions; set "
            "model.path to an existing model, or shorten the prompts"
        )
    answers = []
    for problem in problems:
        pair = task.demonstrations(problem.fields)
        for text in (pair.wrong, pair.right):
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) > completion_length:
                raise ConfigError(
                    f"the demonstration {text} takes {len(ids)} tokens; rollout.sampler.completion_length="
                    f"{completion_length} is too short for it"
                )
            answers.append(ids + [eos] * (completion_length - len(ids)))
    return _EncodedAnswers(
        prompt_nP=np.array([[pad] * (width - len(ids)) + ids for ids in prompts]),
        real_nP=np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        answers_n2C=np.array(answers).reshape(len(problems), 2, completion_length),
    )


def _new_model(spec: BaseSpec, tokenizer: PreTrainedTokenizerBase) -> LLaDAModelLM:
    config = LLaDAConfig(
        d_model=spec.d_model,
        n_layers=spec.n_layers,
        n_heads=spec.n_heads,
        mlp_hidden_size=spec.mlp_hidden,
        vocab_size=len(tokenizer),
        max_sequence_length=LONGEST,
        init_std=INIT_STD,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(spec.seed, "sft", "weights"))
        return LLaDAModelLM(config).train()


def _optimize(
    model: LLaDAModelLM, data: _EncodedAnswers, spec: BaseSpec, on_progress: BuildProgress | None
) -> list[float]:
    """AdamW with warm-up and cosine decay; the losses of all steps."""
    rng = numpy_generator(spec.seed, "sft", "batches")
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.sft_lr, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    for step in range(spec.sft_steps):
        optimizer.param_groups[0]["lr"] = spec.sft_lr * _lr_factor(step, spec.sft_steps)
        right = 1.0 if step < spec.right_first * spec.sft_steps else spec.right_fraction
        loss = _loss(model, data, rng, spec.sft_batch, right)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if on_progress:
            on_progress(step + 1, spec.sft_steps, float(np.mean(losses[-50:])))
    return losses


def _loss(
    model: LLaDAModelLM, data: _EncodedAnswers, rng: np.random.Generator, rows: int, right_fraction: float
) -> torch.Tensor:
    """Minus the estimated ELBO per completion token, mean over a fresh batch."""
    row_B = rng.integers(len(data.prompt_nP), size=rows)
    right_B = rng.random(rows) < right_fraction
    answer_BC, real_BP = data.answers_n2C[row_B, right_B.astype(int)], data.real_nP[row_B]
    masked_BC = draw_masks(rng, *answer_BC.shape)
    input_BC = np.where(masked_BC, model.config.mask_token_id, answer_BC)
    input_BL = torch.from_numpy(np.concatenate([data.prompt_nP[row_B], input_BC], axis=1))
    real_BL = None
    if not real_BP.all():
        real_BL = torch.from_numpy(np.concatenate([real_BP, np.ones_like(answer_BC)], axis=1))
    masked_BL = np.concatenate([np.zeros_like(real_BP, dtype=bool), masked_BC], axis=1)
    logits_NV = model(input_BL, real_BL, logit_rows=torch.from_numpy(np.flatnonzero(masked_BL))).logits
    nll_N = F.cross_entropy(logits_NV, torch.from_numpy(answer_BC[masked_BC]), reduction="none")
    weight_N = torch.from_numpy(elbo_weights(masked_BC)[masked_BC]).float()
    return (weight_N * nll_N).sum() / answer_BC.size


def _lr_factor(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP_FRACTION * steps))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _exclusive(path: Path, *, silence_s: float) -> FileLock:
    """The lock, as soon as nobody else has it. Raises WaitTimeout when its holder shows no life for so long."""
    seen = path.stat().st_mtime_ns if path.exists() else 0
    while True:
        try:
            return FileLock(path, wait_s=silence_s)
        except Held as holder:
            # Compared with itself, not with the clock, which may be another machine's.
            before, seen = seen, path.stat().st_mtime_ns
            if seen == before:
                raise WaitTimeout(
                    f"waited for {holder}, which builds {path.stem} in {path.parent} and has done no step of it for "
                    f"{silence_s:g} s; stop it, or give another model.cache_dir"
                ) from None
            logger.info("waiting for %s, which builds the base %s", holder, path.stem)


if __name__ == "__main__":
    sys.exit(main())
