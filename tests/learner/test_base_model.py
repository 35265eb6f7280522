"""Base building: the estimator against an exact ELBO, what is taught, determinism, the cache and its lock."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.settings.run import load_config
from learner.small_base import base_model
from learner.small_base.base_model import draw_masks, elbo_weights, ensure_base, train_base
from rewards.errors import ConfigError, DataError, WaitTimeout
from rewards.task import AnswerPair, get_task
from rewards.tasks.sudoku import Sudoku
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model

EXACT_ELBO = -1.4938820520
# p(token | other one visible), p(token | both masked) for the two positions of the recorded toy
VISIBLE, BOTH_MASKED = (0.9, 0.7), (0.4, 0.2)
SMALL = ["recipe=smoke", "model.base.sft_steps=4", "model.base.sft_examples=40"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(base_model, "THREADS", 1)


def expected_elbo(counts: range, weights) -> float:
    """The estimator's mean over n uniform on ``counts`` and all sets of n masked positions of the toy."""
    total = 0.0
    for n in counts:
        masks = [mask for mask in itertools.product((False, True), repeat=2) if sum(mask) == n]
        for mask in masks:
            logp = np.log(BOTH_MASKED if n == 2 else VISIBLE)
            weight_BC = weights(np.array([mask])) if n else np.zeros((1, 2))
            total += (weight_BC[0] * logp * np.array(mask)).sum() / len(masks) / len(counts)
    return total


def test_weight_is_the_one_of_the_law_of_n():
    assert expected_elbo(range(1, 3), elbo_weights) == pytest.approx(EXACT_ELBO, abs=1e-9)


def test_other_weights_or_laws_are_biased():
    def one_more(mask):
        return (mask.shape[1] + 1) / mask.sum(axis=1, keepdims=True) * mask

    assert expected_elbo(range(0, 3), one_more) == pytest.approx(EXACT_ELBO, abs=1e-9)  # ESPO's pair, right too
    assert expected_elbo(range(1, 3), one_more) == pytest.approx(1.5 * EXACT_ELBO, abs=1e-9)
    assert expected_elbo(range(0, 3), elbo_weights) == pytest.approx(-0.995921, abs=1e-6)  # DMPO's


def test_masks_follow_that_law():
    masked_BC = draw_masks(np.random.default_rng(0), 40_000, 4)
    law = np.bincount(masked_BC.sum(axis=1), minlength=5) / 40_000
    assert law[0] == 0
    np.testing.assert_allclose(law[1:], 0.25, atol=0.01)
    pairs = masked_BC[masked_BC.sum(axis=1) == 2] @ (1 << np.arange(4))
    np.testing.assert_allclose(np.unique(pairs, return_counts=True)[1] / len(pairs), 1 / 6, atol=0.015)


def test_the_loss_is_minus_the_elbo_per_token():
    """A model that knows nothing has ELBO -C log V whatever is masked, so the loss is log V for every draw."""
    config, task = load_config(SMALL), get_task("sudoku")
    tokenizer = base_model.build_tokenizer()
    data = base_model._encode(task, task.problems("train", seed=0, size=4), tokenizer, 24)
    model = base_model._new_model(config.model.base, tokenizer)
    torch.nn.init.zeros_(model.model.transformer.ff_out.weight)
    for seed in range(5):
        loss = base_model._loss(model, data, np.random.default_rng(seed), 3, 0.5)
        # Weights of a row sum to C, so the mean over rows and positions is that of a constant.
        assert loss.item() == pytest.approx(math.log(len(tokenizer)), rel=1e-5)


@pytest.mark.parametrize("name", ["sudoku", "countdown", "countdown_in_order"])
def test_demonstrators_are_right_and_consistently_wrong(name):
    task, tokenizer = get_task(name), base_model.build_tokenizer()
    problems = task.problems("train", seed=3, size=200)
    pairs = [task.demonstrations(problem.fields) for problem in problems]
    graded = [
        (task.grade(p.fields, d.right), task.grade(p.fields, d.wrong)) for p, d in zip(problems, pairs, strict=True)
    ]
    assert all(right.correct and right.reward == pytest.approx(4.0) for right, _ in graded)
    assert 0 < np.mean([wrong.correct for _, wrong in graded]) < 0.15
    assert max(len(tokenizer.encode(t, add_special_tokens=False)) for p in pairs for t in (p.right, p.wrong)) <= 24
    if name == "sudoku":  # keeps the clues, and every row holds each digit once
        assert all(wrong.components["clues"] == 0.5 for _, wrong in graded)
        assert all(wrong.components["permutation"] == 0.25 for _, wrong in graded)
    else:  # a well-formed expression in the given numbers
        assert all(wrong.components["numbers"] == pytest.approx(1 / 3) for _, wrong in graded)


def test_a_countdown_answer_in_order_comes_with_the_value_of_its_parentheses():
    task, tokenizer = get_task("countdown_in_order"), base_model.build_tokenizer()
    pair = task.demonstrations({"numbers": [3, 5, 2], "target": 16})
    assert pair.right == "<think>08</think><answer>(3+5)*2=16</answer>"
    assert pair.wrong == "<think>15</think><answer>(3*5)*2=16</answer>"
    problems = task.problems("train", seed=0, size=2000)
    data = base_model._encode(task, problems, tokenizer, 16)
    assert data.real_nP.all() and not (data.answers_n2C == tokenizer.eos_token_id).any()  # one layout, nothing padded


def test_a_problem_without_a_solution_is_refused():
    with pytest.raises(DataError, match=r"\[1, 1, 1\] -> 9 has no solution"):
        get_task("countdown").demonstrations({"numbers": [1, 1, 1], "target": 9})


def test_a_task_without_demonstrators_is_refused():
    with pytest.raises(ConfigError, match=r"gsm8k.*model\.path.*the method demonstrations"):
        get_task("gsm8k").demonstrations({})


class _OtherWrongRule(Sudoku):
    def demonstrations(self, fields):
        pair = super().demonstrations(fields)
        return AnswerPair(pair.right, pair.wrong[::-1])


def test_another_demonstrator_is_another_base():
    """The cache would give a changed task of one's own the base of its old demonstrations."""
    spec = load_config(SMALL).model.base
    keys = []
    for task in (Sudoku(), Sudoku(), _OtherWrongRule()):
        problems = task.problems("train", seed=0, size=3)
        pairs = [task.demonstrations(problem.fields) for problem in problems]
        keys.append(base_model._key(task, spec, problems, pairs, 24))
    assert keys[0] == keys[1] != keys[2]


def test_prompts_too_long_for_the_base_are_refused_before_it_is_trained():
    task = get_task("sudoku_agrpo")
    with pytest.raises(ConfigError, match=r"takes \d{4} tokens .* 512 positions; set model\.path"):
        base_model._encode(task, task.problems("train", seed=0, size=1), base_model.build_tokenizer(), 24)


def test_same_arguments_same_bits_and_global_generators_untouched(tmp_path):
    config, task = load_config(SMALL), get_task("sudoku")
    problems = task.problems("train", seed=0, size=40)
    torch.manual_seed(5)
    np.random.seed(5)
    threads, state, numpy_state = torch.get_num_threads(), torch.get_rng_state(), np.random.get_state()[1].copy()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(5 if name == "a" else 6)
        spec = config.model.base.model_copy(update={"seed": seed})
        metrics = train_base(spec, task, problems, 24, tmp_path / name)
        assert metrics["loss"] > 0
        if name == "a":
            assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert torch.get_num_threads() == threads
    bits = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert bits["a"] == bits["b"] != bits["c"]


def test_right_demonstrations_come_first(tmp_path, monkeypatch):
    shares: list[float] = []
    whole_loss = base_model._loss

    def noted(model, data, rng, rows, right_fraction):
        shares.append(right_fraction)
        return whole_loss(model, data, rng, rows, right_fraction)

    monkeypatch.setattr(base_model, "_loss", noted)
    ensure_base(load_config([*SMALL, "model.base.right_first=0.5", "model.base.right_fraction=0.25"]), tmp_path)
    assert shares == [1.0, 1.0, 0.25, 0.25]


def test_training_lowers_the_loss(tmp_path):
    config, task = load_config([*SMALL, "model.base.sft_steps=30", "model.base.sft_lr=5e-3"]), get_task("sudoku")
    seen: list[float] = []
    problems = task.problems("train", seed=0, size=40)
    train_base(config.model.base, task, problems, 24, tmp_path / "base", on_progress=lambda *now: seen.append(now[2]))
    assert len(seen) == 30
    assert seen[-1] < 0.8 * seen[0]


def test_a_prompt_and_its_padding_are_encoded_as_the_engine_sees_them():
    task, tokenizer = get_task("countdown"), base_model.build_tokenizer()
    problems = task.problems("train", seed=0, size=50)
    data = base_model._encode(task, problems, tokenizer, 24)
    widths = data.real_nP.sum(axis=1)
    assert widths.min() < widths.max() == data.prompt_nP.shape[1]
    row = int(widths.argmin())
    ids = data.prompt_nP[row, -widths[row] :]
    assert list(ids) == base_model.encode_prompt(tokenizer, task.messages(problems[row].fields))
    text = tokenizer.decode(data.answers_n2C[row, 1], skip_special_tokens=True)
    assert task.grade(problems[row].fields, text).correct
    with pytest.raises(ConfigError, match="completion_length=8 is too short"):
        base_model._encode(task, problems, tokenizer, 8)


def test_the_base_is_cached_by_what_it_depends_on(tmp_path):
    first = ensure_base(load_config(SMALL), tmp_path)
    built = (first / "model.safetensors").stat().st_mtime_ns
    assert ensure_base(load_config([*SMALL, "learner.lr=5e-4"]), tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == built
    for other in ("model.base.seed=1", "run.seed=1", "model.base.right_fraction=0.5"):
        assert ensure_base(load_config([*SMALL, other]), tmp_path) != first
    assert policy_adapter(first).mask_token_id == load_tokenizer(first).mask_token_id
    assert load_model(first).config.d_model == 32
    assert json.loads((first / "sft.json").read_text())["task"] == "sudoku"


def test_an_interrupted_build_leaves_no_base(tmp_path):
    def stop(done: int, *_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_base(load_config(SMALL), tmp_path, on_progress=stop)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert (ensure_base(load_config(SMALL), tmp_path) / "config.json").is_file()


def test_held_out_problems_are_never_taught(tmp_path):
    config, task = load_config(SMALL), get_task("sudoku")
    taught = {p.fields["solution"] for p in base_model._training_problems(config, task)}
    held_out = {p.fields["solution"] for p in task.problems("test", seed=config.run.seed, size=config.task.test_size)}
    assert taught and held_out and not taught & held_out
    # A file that shares every grid with the held-out problems leaves nothing to teach.
    rows = "".join(f"{p.fields['puzzle']},{p.fields['solution']}\n" for p in task.problems("test", seed=0, size=5))
    (tmp_path / "train.csv").write_text("puzzle,solution\n" + rows)
    with pytest.raises(DataError, match="no training problem"):
        ensure_base(load_config([*SMALL, f"task.train_path={tmp_path / 'train.csv'}"]), tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from learner.small_base.base_model import _exclusive
with _exclusive(Path(sys.argv[1]), silence_s=5) as lock:
    print("held", flush=True)
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        lock.show_life()
        time.sleep(0.1)
    if len(sys.argv) > 3:
        time.sleep(60)
"""


def hold(lock: Path, *told: str) -> "subprocess.Popen[str]":
    """A process that has the lock and shows life for so many seconds."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock), *told], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert any(line == "held\n" for line in holder.stdout)
    return holder


@pytest.mark.slow
def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    lock = tmp_path / "base.lock"
    holder = hold(lock, "0", "then silent")
    try:
        with pytest.raises(WaitTimeout, match=f"process {holder.pid} .* no step of it"):
            base_model._exclusive(lock, silence_s=0.5)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(timeout=10)
    with base_model._exclusive(lock, silence_s=0.5):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


@pytest.mark.slow
def test_a_builder_that_shows_life_is_waited_for(tmp_path):
    lock = tmp_path / "base.lock"
    holder = hold(lock, "3")
    begin = time.monotonic()
    with base_model._exclusive(lock, silence_s=1.5):
        assert time.monotonic() - begin > 2, "longer than the silence that would have ended the wait"
    holder.wait(timeout=10)
