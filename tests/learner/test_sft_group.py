"""Supervised fine-tuning on the real group: the same gradient on any layout and packing, one optimizer step per update,
learning, and whole runs that are killed, go on with the same bits, and hand their adapter to reinforcement learning."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from learner.finetuning import rank as sft_rank
from learner.finetuning.data import Demonstrations, load_demonstrations
from learner.finetuning.noising import noised
from learner.finetuning.rank import SftGroup, SftRank
from learner.finetuning.run import update_batch
from learner.finetuning.settings import SftConfig, load_sft_config
from learner.likelihood.scorer import restricted_logp
from learner.ranks.optim import learning_rate
from learner.ranks.rank import lora_spec
from rollout.adapters import AdapterState, adapter_parameters, digest, load_state, pack, read_peft_folder
from rollout.models.encoding import load_tokenizer
from rollout.models.family import policy_adapter
from rollout.models.loading import load_model
from rollout.models.lora import attach_lora
from tests.support.hand_made import acting_adapter
from tests.support.learner_ranks import adamw_steps, importing_ray, relative
from tests.support.real_runs import Runs, iterations, rows, saved_iterations, summary, wait_until

pytestmark = pytest.mark.slow

LETTERS = "abcdefgh"


class RestartableRank(SftRank):
    def reconfigure(self, config: SftConfig) -> None:
        self.config = config


class Group(SftGroup):
    """A group that can be started again without new processes."""

    def restart(self, config: SftConfig, adapter: AdapterState | None = None) -> "Group":
        assert config.learner.ranks == self.config.learner.ranks
        self.config = config
        self._all("reconfigure", config, limit=60)
        self._start(adapter, None)
        return self


def toy_rows(count: int, *, shuffled: bool = False) -> list[dict[str, str]]:
    """The answer is the letter that a prompt repeats among digits; shuffled, it is another row's."""
    rng = np.random.default_rng(7)
    answers = [LETTERS[i] for i in rng.integers(len(LETTERS), size=count)]
    noise = ["".join(map(str, rng.integers(10, size=int(n)))) for n in rng.integers(3, 12, size=count)]
    given = [answers[i] for i in rng.permutation(count)] if shuffled else answers
    pairs = zip(answers, noise, given, strict=True)
    return [{"prompt": f"{a * 6}{digits}{a * 2}", "completion": f"<answer>{g}</answer>"} for a, digits, g in pairs]


def toy_file(folder: Path, **options: Any) -> str:
    path = folder / "toy.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows(**options)))
    return str(path)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return toy_file(tmp_path_factory.mktemp("toy"), count=240)


@pytest.fixture(scope="module")
def groups(tiny_model: str, data_file: str) -> Iterator[dict[int, Group]]:
    with importing_ray(cpus=4), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_rank, "SftRank", RestartableRank)
        started: dict[int, Group] = {}
        try:
            for ranks in (1, 2):
                config = settings(tiny_model, data_file, learner__ranks=ranks)
                started[ranks] = Group(config, tiny_model, adapter=None, shards=None)
            yield started
        finally:
            for group in started.values():
                group.close()


def settings(model: str, data: str, **changes: Any) -> SftConfig:
    given = {
        "model__path": model,
        "data__train": data,
        "data__max_tokens": 96,
        "data__held_out_fraction": 0.1,
        "lora__r": 4,
        "sft__eos_tokens": 6,
        **changes,
    }
    return load_sft_config([f"{key.replace('__', '.')}={value}" for key, value in given.items()])


def demonstrations(config: SftConfig, model: str) -> Demonstrations:
    mask_id = policy_adapter(model).mask_token_id
    return load_demonstrations(config.data, load_tokenizer(model), mask_token_id=mask_id, seed=config.run.seed)


def first_batch(config: SftConfig, data: Demonstrations, number: int = 0) -> list[ray.ObjectRef]:
    return [ray.put(update_batch(data, seed=config.run.seed, batch=config.sft.batch, number=number))]


def plain_gradient(model_path: str, config: SftConfig, data: Demonstrations, adapter: AdapterState) -> AdapterState:
    """The first update's gradient by plain autograd: one unpacked example at a time, no plan, no DeepSpeed."""
    family = policy_adapter(model_path)
    model = attach_lora(load_model(model_path), family, lora_spec(config)).train()
    load_state(model, adapter)
    batch = update_batch(data, seed=config.run.seed, batch=config.sft.batch, number=0)
    for example, epoch in zip(batch.examples, batch.epochs, strict=True):
        s = noised(
            example,
            config.sft,
            seed=config.run.seed,
            epoch=epoch,
            eos_token_id=family.eos_token_id,
            longest=config.data.max_tokens,
        )
        ids = np.concatenate([s.prompt_ids, np.where(s.masked, family.mask_token_id, s.completion_ids)])
        logits = model(input_ids=torch.from_numpy(ids[None].astype(np.int64))).logits[0, s.prompt_ids.size :]
        target = torch.from_numpy(s.completion_ids.astype(np.int64))
        law = restricted_logp(logits, target, None, temperature=1.0, mask_token_id=family.mask_token_id)
        loss = -(s.weight * law.logp_N[torch.from_numpy(s.masked)]).sum() / s.masked.size
        (loss / len(batch.examples)).backward()
    return pack({name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None})


@pytest.fixture(scope="module")
def adapter(tiny_model: str, data_file: str) -> AdapterState:
    config = settings(tiny_model, data_file)
    return acting_adapter(attach_lora(load_model(tiny_model), policy_adapter(tiny_model), lora_spec(config)))


def test_the_gradient_depends_on_neither_ranks_nor_packing_nor_micro_batches(
    groups: dict[int, Group], tiny_model: str, data_file: str, adapter: AdapterState
) -> None:
    config = settings(tiny_model, data_file)
    data = demonstrations(config, tiny_model)
    expected = plain_gradient(tiny_model, config, data, adapter)
    layouts = [(1, 0, True, 1), (1, 0, False, 1), (1, 0, False, 5), (2, 0, True, 1), (2, 0, False, 3), (2, 2, True, 2)]
    for ranks, stage, packing, rows_per_forward in layouts:
        layout = {
            "learner__ranks": ranks,
            "learner__zero_stage": stage,
            "sft__packing": str(packing).lower(),
            "sft__rows_per_forward": rows_per_forward,
        }
        group = groups[ranks].restart(settings(tiny_model, data_file, **layout), adapter)
        error = relative(expected, group.gradient(first_batch(config, data), 0))
        print(f"{ranks} ranks, stage {stage}, packing {packing}, {rows_per_forward} rows: relative L2 {error:.1e}")
        assert error <= 2e-6
    by_token = settings(tiny_model, data_file, sft__normaliser="token")
    other = groups[1].restart(by_token, adapter).gradient(first_batch(config, data), 0)
    assert relative(expected, other) > 1e-2, "control: the normaliser matters"


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_update_is_one_optimizer_step(
    groups: dict[int, Group], tiny_model: str, data_file: str, adapter: AdapterState, ranks: int
) -> None:
    config = settings(tiny_model, data_file, learner__ranks=ranks, sft__packing="false")
    data = demonstrations(config, tiny_model)
    group = groups[ranks].restart(config, adapter)
    report = group.update(first_batch(config, data), 0, 1e-3)
    assert report.applied and report.forwards == config.sft.batch and adamw_steps(group) == {1}
    assert group.update(first_batch(config, data, 1), 1, 1e-3).applied and adamw_steps(group) == {2}


def test_the_held_out_loss_is_fixed_and_the_same_on_any_layout(
    groups: dict[int, Group], tiny_model: str, data_file: str, adapter: AdapterState
) -> None:
    config = settings(tiny_model, data_file)
    data = demonstrations(config, tiny_model)
    held_out, losses = [ray.put(data.held_out)], []
    for ranks, packing in ((1, "true"), (1, "false"), (2, "true")):
        group = groups[ranks].restart(
            settings(tiny_model, data_file, learner__ranks=ranks, sft__packing=packing), adapter
        )
        losses += [group.held_out(held_out)["held_out/loss"] for _ in range(2)]
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5) and losses[0] == losses[1]
    assert adamw_steps(groups[1]) == {0}


def test_it_learns_and_what_it_learns_is_the_answers(
    groups: dict[int, Group], tiny_model: str, tmp_path: Path, data_file: str
) -> None:
    """Held out are 24 prompts never shown. Shuffled answers have the same form and frequencies: what they can't teach
    is which answer belongs to which prompt."""
    changes = {"lora__r": 32, "lora__alpha": 64, "lora__include_head": "true", "sft__batch": 48}
    shuffled_file = toy_file(tmp_path, count=240, shuffled=True)
    true = demonstrations(settings(tiny_model, data_file, **changes), tiny_model)
    after = {}
    for name, path in (("true", data_file), ("shuffled", shuffled_file)):
        config = settings(tiny_model, path, **changes)
        data = demonstrations(config, tiny_model)
        group = groups[1].restart(config)
        held_out = [ray.put(true.held_out)]
        before = group.held_out(held_out)["held_out/loss"]
        rates = [learning_rate(i, 80, peak=3e-3, schedule="linear", warmup_fraction=0.0) for i in range(80)]
        losses = [group.update(first_batch(config, data, i), i, lr).loss for i, lr in enumerate(rates)]
        after[name] = group.held_out(held_out)["held_out/loss"]
        print(
            f"{name}: loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}, held out {before:.2f} -> {after[name]:.2f}"
        )
        assert np.mean(losses[-10:]) < 0.2 * losses[0], "both learn the form"
    assert after["true"] < 0.1 * before
    assert after["shuffled"] > 1.25 * after["true"]


# ---- whole runs


@pytest.fixture(scope="module")
def sft_runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: str, data_file: str) -> Runs:
    arguments = {
        "model.path": tiny_model,
        "data.train": data_file,
        "data.max_tokens": 96,
        "data.held_out_fraction": 0.1,
        "lora.r": 4,
        "lora.alpha": 4,
        "learner.lr": 5e-3,
        "learner.lr_schedule": "linear",
        "sft.eos_tokens": 6,
        "sft.epochs": 2,
        "sft.batch": 36,
        "sft.evaluate_every": 4,
        "checkpoint.every": 3,
    }
    given = [f"{key}={value}" for key, value in arguments.items()]
    folder = tmp_path_factory.mktemp("sft-runs")
    return Runs(folder, tmp_path_factory.mktemp("cache"), settings=given, module="learner.sft")


@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.heavy
def test_a_killed_run_goes_on_with_the_same_bits_and_hands_over_its_adapter(sft_runs: Runs, tiny_model: str) -> None:
    told = sft_runs.train("undisturbed")
    whole = sft_runs["undisturbed"]
    assert iterations(whole) == list(range(1, 13)) and "216 demonstrations to learn, 24 held out; 12 updates" in told
    figures = summary(whole)
    assert figures["trained"]["held_out"]["held_out/loss"] < figures["base"]["held_out"]["held_out/loss"]
    assert {"loss", "nll_masked", "padding_share", "eos_share", "lr", "grad_norm"} <= set(rows(whole)[1])

    with sft_runs.started("killed") as run:
        run.wait_for_row(8)
        os.killpg(run.popen.pid, signal.SIGKILL)
        wait_until(lambda: not run.members(), "the end of all processes", 30)
    killed = sft_runs["killed"]
    assert saved_iterations(killed) and max(saved_iterations(killed)) < 12
    sft_runs.train("killed", "resume=auto")
    assert rows(killed) == rows(whole) and summary(killed) == summary(whole)
    assert adapter_digest(killed.adapter_dir) == adapter_digest(whole.adapter_dir)

    rl = Runs(sft_runs.folder, sft_runs.cache, settings=["recipe=smoke", f"model.path={tiny_model}"])
    rl.train("rl", f"lora.adapter={whole.adapter_dir}", "run.iterations=1", "learner.lr=1e-12")
    start, end = (read_peft_folder(path)[0] for path in (whole.adapter_dir, rl["rl"].adapter_dir))
    assert relative(start, end) < 1e-6, "it started from there"


def adapter_digest(folder: Path) -> str:
    return digest(read_peft_folder(folder)[0])
