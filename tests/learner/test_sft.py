"""Supervised fine-tuning without Ray: settings, data, the noise and its loss, packing."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.finetuning import noising
from learner.finetuning.data import D1_INSTRUCTION, Demonstrations, Example, load_demonstrations, turn_end
from learner.finetuning.noising import held_out_draws, noised
from learner.finetuning.packing import PackedForward, build_tokens, first_fit_decreasing, plan_rows
from learner.finetuning.run import total_updates, update_batch
from learner.finetuning.settings import DataSection, SftSection, files_read, help_text, load_sft_config
from learner.likelihood.scorer import restricted_logp
from learner.runs.start import open_run
from learner.settings import arguments as overrides
from learner.settings.run import load_config, refuse_absent, refuse_relative
from learner.settings.sections import RunPlace
from rewards.errors import CheckpointError, ConfigError, DataError
from rollout.models.encoding import encode_prompt
from rollout.models.loading import load_model
from rollout.models.tokenizer import build_tokenizer

EOS, MASK = 0, 1
SOUND = ["data.train=d.jsonl", "model.path=m"]
EXACT_ELBO = -1.4938820520  # of the toy below, over both orders of revealing
VISIBLE, BOTH_MASKED = (0.9, 0.7), (0.4, 0.2)  # p(token | other visible), p(token | both masked)


def example(name: str, prompt: int, completion: int, *, ended: bool = True) -> Example:
    rng = np.random.default_rng(len(name) + prompt * 100 + completion)
    ids = (rng.integers(20, 90, size).astype(np.int32) for size in (prompt, completion))
    return Example(name, *ids, ended)


def sequences(*sizes: tuple[int, int], sft: SftSection = SftSection(eos_tokens=4), longest: int = 64) -> list[Any]:  # noqa: B008
    made = [example(f"e{i}", *size) for i, size in enumerate(sizes)]
    return [noised(e, sft, seed=0, epoch=0, eos_token_id=EOS, longest=longest) for e in made]


# ---- settings


@pytest.mark.parametrize("name", overrides.recipe_names("sft"))
def test_every_recipe_loads_and_says_what_it_is(name: str) -> None:
    load_sft_config([f"recipe={name}"])
    assert overrides.recipe_summary(name)
    assert f"  {name}" in help_text()


def test_the_published_recipe_is_the_published_one() -> None:
    config = load_sft_config(["recipe=sft_d1_s1k"])
    assert (config.lora.r, config.lora.alpha, config.learner.lr, config.learner.weight_decay) == (128, 256, 1e-5, 0.1)
    assert (config.data.max_tokens, config.sft.epochs, config.sft.batch) == (4096, 20, 16)
    assert (config.sft.eos_tokens, config.sft.packing, config.sft.masking) == (None, False, "rate")


def test_recipes_of_the_two_kinds_are_told_apart() -> None:
    kinds = overrides.recipe_names("run"), overrides.recipe_names("sft")
    assert "sudoku" in kinds[0] and "sft_d1_s1k" in kinds[1] and not set(kinds[0]) & set(kinds[1])
    with pytest.raises(ConfigError, match="python -m learner.sft, not for learner.main"):
        load_config(["recipe=sft_d1_s1k"])
    with pytest.raises(ConfigError, match="python -m learner.main, not for learner.sft"):
        load_sft_config(["recipe=sudoku"])


MISTAKES = {
    "no data": (["model.path=m"], ["data.train", "jsonl"]),
    "no model": (["data.train=d.jsonl"], ["model.path", "folder or a hub name"]),
    "the same data": ([*SOUND, "data.held_out=d.jsonl"], ["data.held_out=d.jsonl", "another file"]),
    "best of nothing": ([*SOUND, "data.held_out_fraction=0"], ["sft.adapter=best", "sft.adapter=last"]),
    "packing full rows": ([*SOUND, "sft.eos_tokens=null"], ["sft.packing=true", "sft.packing=false"]),
    "EOS only": ([*SOUND, "data.max_tokens=64"], ["sft.eos_tokens=64", "data.max_tokens=64"]),
    "unknown key": ([*SOUND, "sft.epoch=3"], ["sft.epoch", "sft.epochs"]),
    "of the other kind": ([*SOUND, "rollout.actors=3"], ["'rollout'"]),
    "name": ([*SOUND, "run.name=a/b"], ["run.name=a/b"]),
    "bf16 at stage 0": ([*SOUND, "learner.dtype=bfloat16"], ["learner.dtype=bfloat16", "zero_stage"]),
}


@pytest.mark.parametrize("arguments, fragments", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_contradiction_gets_one_sentence(arguments: list[str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sft_config(arguments)
    assert all(fragment in str(caught.value) for fragment in fragments), caught.value
    assert len(str(caught.value).splitlines()) == 1


def test_sound_settings_pass_the_same_checks() -> None:
    load_sft_config([*SOUND, "sft.eos_tokens=null", "sft.packing=false", "data.max_tokens=64"])
    load_sft_config([*SOUND, "data.held_out_fraction=0", "sft.adapter=last"])


def test_the_command_prints_settings_and_names_mistakes(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        where = {"cwd": Path(__file__).resolve().parents[2], "capture_output": True, "text": True, "timeout": 60}
        return subprocess.run([sys.executable, "-m", "learner.sft", *arguments], **where)  # type: ignore[call-overload]

    printed = command(*SOUND, "sft.epochs=7", "--print-config")
    assert printed.returncode == 0 and json.loads(printed.stdout)["sft"]["epochs"] == 7
    refused = command("recipe=sudoku")
    assert refused.returncode == 2 and refused.stderr.startswith("error: recipe sudoku")


def test_relative_files_are_named_and_hub_names_are_none() -> None:
    read = files_read(load_sft_config(["data.train=d.jsonl", "model.path=GSAI-ML/LLaDA-8B-Instruct"]))
    with pytest.raises(ConfigError, match="data.train=d.jsonl is relative") as caught:
        refuse_relative(read)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="^data.train=d.jsonl: there is no such file or folder$"):
        refuse_absent(read)
    of_the_hub = files_read(load_sft_config(["recipe=sft_d1_s1k"]))
    refuse_relative(of_the_hub)
    refuse_absent(of_the_hub)


# ---- data


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, **changes: Any) -> Demonstrations:
    data = DataSection(train=path, **{"max_tokens": 200, "held_out_fraction": 0.0, **changes})
    return load_demonstrations(data, build_tokenizer(), mask_token_id=MASK, seed=0)


WRITTEN = "<think>T</think>\n<answer>A</answer>"
FORMATS = [
    {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": WRITTEN},
        ]
    },
    {"prompt": "Q", "completion": WRITTEN},
    {"prompt": [{"role": "user", "content": "Q"}], "completion": WRITTEN},
    {"question": "Q", "thinking": "T", "answer": "A"},
    {"question": "Q", "thinking_trajectories": ["T", "unused"], "attempt": "A", "solution": "S", "cot_type": "math"},
    {"question": "Q", "deepseek_thinking_trajectory": "T", "deepseek_attempt": "A", "gemini_attempt": "G"},
]


def test_all_formats_say_the_same(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    expected = tokenizer.encode(WRITTEN, add_special_tokens=False)
    for number, row in enumerate(FORMATS):
        (found,) = load(write(tmp_path / f"{number}.jsonl", [row])).train
        assert found.prompt_ids.tolist() == encode_prompt(tokenizer, [{"role": "user", "content": "Q"}])
        assert found.completion_ids.tolist() == [*expected, tokenizer.convert_tokens_to_ids("<|eot_id|>")]
        assert found.ended


def test_d1s_writing_of_a_reasoning_trace(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    (found,) = load(write(tmp_path / "a.jsonl", [FORMATS[3]]), reasoning="d1", max_tokens=400).train
    assert D1_INSTRUCTION.strip() in tokenizer.decode(found.prompt_ids)
    text = tokenizer.decode(found.completion_ids, skip_special_tokens=True)
    assert text == "<reasoning>T</reasoning>\n<answer>A</answer>"


def test_a_template_without_a_token_for_the_end_adds_none() -> None:
    tokenizer = build_tokenizer()
    assert turn_end(tokenizer) == [tokenizer.convert_tokens_to_ids("<|eot_id|>")]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert turn_end(tokenizer) == []
    tokenizer.chat_template = None
    assert turn_end(tokenizer) == []


BAD_ROWS = {
    "unknown columns": ({"text": "x"}, "the columns text are in no known format"),
    "user last": ({"messages": [{"role": "user", "content": "Q"}]}, "the last message is the user's"),
    "no list": ({"messages": "Q"}, "messages is not a list"),
    "empty completion": ({"prompt": "Q", "completion": " "}, "completion is empty"),
    "no text": ({"question": "Q", "thinking": [], "answer": "A"}, "thinking is not text"),
}


@pytest.mark.parametrize("row, sentence", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    path = write(tmp_path / "bad.jsonl", [FORMATS[1], row])
    with pytest.raises(DataError, match=f"bad.jsonl, line 2: {sentence}"):
        load(path)


def test_the_mask_token_in_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sft-a-1 holds the mask token"):
        load(write(tmp_path / "a.jsonl", [{"prompt": "Q", "completion": "a<|mdm_mask|>b"}]))


def test_too_long_examples_are_dropped_or_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": "x" * n} for n in (10, 100)] + [{"prompt": "Q" * 80, "completion": "x"}]
    path = write(tmp_path / "a.jsonl", rows)
    dropped = load(path, max_tokens=50)
    assert [e.completion_ids.size for e in dropped.train] == [11] and "2 of 3" in dropped.told[0]
    cut = load(path, max_tokens=50, too_long="cut")
    assert [e.length for e in cut.train][1] == 50 and [e.ended for e in cut.train] == [True, False]
    assert "1 of 3" in cut.told[0] and "left out" in cut.told[0]  # no room for its completion at all
    assert "1 of 3" in cut.told[1] and "lose the end" in cut.told[1]
    assert load(path).told == ()
    with pytest.raises(DataError, match="fits into data.max_tokens=8"):
        load(path, max_tokens=8)


def test_the_held_out_share_is_drawn_by_the_seed_and_never_learned(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "completion": f"x{n}"} for n in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    first, second = load(path, held_out_fraction=0.25), load(path, held_out_fraction=0.25)
    assert len(first.held_out) == 10 and len(first.train) == 30 and not first.told
    assert first.fingerprint == second.fingerprint != load(path, held_out_fraction=0.2).fingerprint
    assert not {e.id for e in first.held_out} & {e.id for e in first.train}
    again = write(tmp_path / "b.jsonl", rows + [{"prompt": f"Q{n}", "completion": "other"} for n in range(40)])
    leaky = load(again, held_out_fraction=0.25)
    assert not {e.prompt_ids.tobytes() for e in leaky.held_out} & {e.prompt_ids.tobytes() for e in leaky.train}
    assert "have the prompt of a held-out one" in leaky.told[0]
    with pytest.raises(ConfigError, match="leaves none to learn"):
        load(write(tmp_path / "c.jsonl", rows[:1]), held_out_fraction=0.5)


# ---- the noise


def drawn(e: Example, epoch: int = 0, longest: int = 64, **changes: Any) -> noising.NoisedExample:
    return noised(e, SftSection(**changes), seed=0, epoch=epoch, eos_token_id=EOS, longest=longest)


def test_draws_belong_to_example_and_epoch() -> None:
    first, second = example("a", 5, 20), example("b", 5, 20)
    alone = drawn(first)
    drawn(second)
    assert (drawn(first).masked == alone.masked).all() and drawn(first).eos == alone.eos
    others = [drawn(first, epoch=1), drawn(second)]
    assert all(o.masked.size != alone.masked.size or (o.masked != alone.masked).any() for o in others)


def test_eos_follow_the_end_as_the_rule_says() -> None:
    e = example("a", 5, 20)
    numbers = {drawn(e, epoch, eos_tokens=3).eos for epoch in range(60)}
    assert numbers == {1, 2, 3}
    sequence = drawn(e, eos_tokens=3)
    assert (sequence.completion_ids[20:] == EOS).all() and sequence.completion_ids.size == 20 + sequence.eos
    assert drawn(e, eos_tokens=None).length == 64, "published: up to the maximum length"
    assert drawn(example("a", 5, 58), eos_tokens=30).length == 64, "never beyond it"
    assert drawn(example("a", 5, 58, ended=False), eos_tokens=30).eos == 0, "nothing follows what was cut"
    assert any(drawn(e, epoch, eos_tokens=3).masked[20:].any() for epoch in range(10)), "EOS are targets too"


@pytest.mark.parametrize("masking", ["count", "rate"])
def test_the_loss_estimates_the_exact_elbo(masking: str) -> None:
    """Enumerated on a toy of two tokens, whose ELBO over both orders is known."""
    toy = Example("toy", np.array([5], np.int32), np.array([30, 31], np.int32), ended=False)
    draws, total, of_n = 12_000 if masking == "rate" else 4000, 0.0, 0.0
    for epoch in range(draws):
        sequence = drawn(toy, epoch, masking=masking)
        n = int(sequence.masked.sum())
        logp = np.log(BOTH_MASKED if n == 2 else VISIBLE)
        total += sequence.weight * (logp * sequence.masked).sum()
        of_n += (2 / n if n else 0.0) * (logp * sequence.masked).sum()
    assert total / draws == pytest.approx(EXACT_ELBO, abs=0.06)
    if masking == "rate":
        assert of_n / draws == pytest.approx(-0.995921, abs=0.03), "control: C/n under the law of rates is biased"


def test_a_model_that_knows_nothing_has_the_same_loss_in_every_draw() -> None:
    e = example("a", 5, 20)
    of_count = [drawn(e, epoch) for epoch in range(50)]
    assert all(s.weight * s.masked.sum() == pytest.approx(s.masked.size) for s in of_count)
    of_rate = [drawn(e, epoch, masking="rate") for epoch in range(50)]
    assert np.std([s.weight * s.masked.sum() / s.masked.size for s in of_rate]) > 0.1, "control: rates vary"


def test_held_out_draws_are_fixed_and_spread() -> None:
    e, sft = example("a", 5, 40), SftSection(held_out_draws=4, eos_tokens=2)
    first, second = (held_out_draws(e, sft, seed=0, eos_token_id=EOS, longest=64) for _ in range(2))
    assert all((a.masked == b.masked).all() for a, b in zip(first, second, strict=True))
    shares = [s.masked.mean() for s in first]
    assert all(i / 4 <= share + 0.03 and share <= (i + 1) / 4 + 0.03 for i, share in enumerate(shares)), shares


# ---- packing


def test_first_fit_decreasing_on_a_known_case() -> None:
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [(1, 4), (0, 3, 2, 5)]
    assert first_fit_decreasing([3, 3, 5], 0) == [(2,), (0,), (1,)]


def test_packing_fits_and_takes_every_sequence_once() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 200).tolist()
    rows = first_fit_decreasing(lengths, 512)
    assert sorted(itertools.chain(*rows)) == list(range(200))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 512
    assert sum(lengths) / (512 * len(rows)) > 0.95


@pytest.mark.parametrize("ranks, rows_per_forward, packing", [(1, 1, True), (2, 1, True), (3, 2, False), (4, 3, True)])
def test_every_rank_has_the_same_number_of_forwards(ranks: int, rows_per_forward: int, packing: bool) -> None:
    made = sequences((5, 10), (5, 30), (9, 12), (3, 40), (5, 5), (2, 20), (4, 4))
    plan = plan_rows(
        made, capacity=64, packing=packing, by_example=True, ranks=ranks, rows_per_forward=rows_per_forward
    )
    assert len({len(share) for share in plan.forwards}) == 1 and len(plan.forwards) == ranks
    live = [i for share in plan.forwards for f in share if f.live for row in f.rows for i in row]
    assert sorted(live) == list(range(7))
    assert all(len(f.rows) <= rows_per_forward for share in plan.forwards for f in share)
    assert plan.normaliser == 7


def test_idle_ranks_get_a_forward_without_weight() -> None:
    made = sequences((5, 10))
    plan = plan_rows(made, capacity=64, packing=True, by_example=True, ranks=2, rows_per_forward=1)
    assert [share[0].live for share in plan.forwards] == [True, False]
    idle = build_tokens(plan.forwards[1][0], made, by_example=True, mask_id=MASK, pad_id=EOS)
    assert idle.weight.size and not idle.weight.any()


def test_a_packed_row_holds_its_sequences_as_they_are() -> None:
    made = sequences((5, 10), (7, 6))
    batch = build_tokens(PackedForward(((1, 0),)), made, by_example=True, mask_id=MASK, pad_id=EOS)
    start = 0
    for number, index in ((1, 1), (2, 0)):
        sequence = made[index]
        ids = batch.input_ids[0, start : start + sequence.length]
        P = sequence.prompt_ids.size
        assert (ids[:P] == sequence.prompt_ids).all(), "prompts are never masked"
        assert (ids[P:] == np.where(sequence.masked, MASK, sequence.completion_ids)).all()
        assert batch.attention_mask is not None
        assert (batch.attention_mask[0, start : start + sequence.length] == number).all()
        start += sequence.length
    assert (batch.input_ids.ravel()[batch.score_rows] == MASK).all()
    assert batch.score_rows.size == sum(s.masked.sum() for s in made)


def test_a_whole_row_needs_no_mask_and_a_forward_without_targets_scores_one_for_nothing() -> None:
    made = sequences((5, 10))
    assert build_tokens(PackedForward(((0,),)), made, by_example=True, mask_id=MASK, pad_id=EOS).attention_mask is None
    nothing = [noising.NoisedExample(made[0].prompt_ids, made[0].completion_ids, np.zeros_like(made[0].masked), 2.0, 1)]
    batch = build_tokens(PackedForward(((0,),)), nothing, by_example=True, mask_id=MASK, pad_id=EOS)
    assert batch.weight.tolist() == [0.0] and batch.score_rows.tolist() == [5]


def loss_and_gradient(
    model: torch.nn.Module, forwards: list[PackedForward], made: list[Any], *, numbers: bool = True
) -> Any:
    """The update's loss and gradient by plain autograd; without ``numbers`` a packed row is one sequence."""
    model.zero_grad()
    total = 0.0
    for forward in forwards:
        batch = build_tokens(forward, made, by_example=True, mask_id=MASK, pad_id=EOS)
        mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
        if mask is not None and not numbers:
            mask = (mask > 0).long()
        rows = torch.from_numpy(batch.score_rows)
        logits = model(input_ids=torch.from_numpy(batch.input_ids), attention_mask=mask, logit_rows=rows).logits
        law = restricted_logp(logits, torch.from_numpy(batch.targets), None, temperature=1.0, mask_token_id=MASK)
        loss = -(torch.from_numpy(batch.weight).float() * law.logp_N).sum() / len(made)
        loss.backward()
        total += float(loss.detach())
    gradient = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return total, gradient


def test_a_packed_update_is_the_unpacked_one(tiny_model: str) -> None:
    model = load_model(tiny_model).train()
    made = sequences((5, 10), (5, 30), (9, 12), (3, 40), (5, 5), (2, 20), (4, 4))
    layout: dict[str, Any] = {"capacity": 64, "by_example": True, "ranks": 1}
    packed = list(plan_rows(made, packing=True, rows_per_forward=2, **layout).forwards[0])
    alone = list(plan_rows(made, packing=False, rows_per_forward=1, **layout).forwards[0])
    padded = list(plan_rows(made, packing=False, rows_per_forward=3, **layout).forwards[0])
    assert (len(packed), len(alone), len(padded)) == (2, 7, 3)
    loss, gradient = loss_and_gradient(model, alone, made)
    for forwards in (packed, padded):
        other_loss, other = loss_and_gradient(model, forwards, made)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert float((other - gradient).norm() / gradient.norm()) < 2e-6
    blind_loss, blind = loss_and_gradient(model, packed, made, numbers=False)
    assert abs(blind_loss - loss) > 1e-4 and float((blind - gradient).norm() / gradient.norm()) > 1e-2, "control"


# ---- the order


def test_every_epoch_shows_every_example_once_and_updates_straddle_epochs() -> None:
    data = Demonstrations(tuple(example(f"e{i}", 3, 4) for i in range(10)), (), ())
    shown: dict[int, list[str]] = {}
    for number in range(5):
        batch = update_batch(data, seed=0, batch=4, number=number)
        for e, epoch in zip(batch.examples, batch.epochs, strict=True):
            shown.setdefault(epoch, []).append(e.id)
    assert {epoch: sorted(ids) for epoch, ids in shown.items()} == {e: sorted(x.id for x in data.train) for e in (0, 1)}
    assert shown[0] != shown[1]
    config = load_sft_config([*SOUND, "sft.epochs=2", "sft.batch=4"])
    assert total_updates(config, data) == 5
    assert total_updates(load_sft_config([*SOUND, "sft.epochs=1", "sft.batch=16"]), data) == 1


# ---- resuming


def test_a_run_of_the_other_kind_is_passed_over_or_refused(tmp_path: Path) -> None:
    for name, kind in (("tuned", "sft"), ("trained", "run")):
        (tmp_path / name / "checkpoints" / "iteration-000001").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({kind: {}}))

    def refused(name: str | None, kind: Any, error: type[Exception], sentence: str, resume: str = "auto") -> None:
        with pytest.raises(error, match=sentence):
            open_run(RunPlace(dir=str(tmp_path), name=name, resume=resume), kind=kind, label="x")

    refused("tuned", "run", ConfigError, "a run of python -m learner.sft")
    refused("trained", "sft", ConfigError, "a run of python -m learner.main")
    refused(None, "sft", CheckpointError, "tuned has no good checkpoint")  # its own kind, the checkpoint being empty
    refused(None, "run", CheckpointError, "trained has no good checkpoint")
