"""Prompts with gaps: how they are written and read, and what the engine makes of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learner.likelihood.scorer import score
from learner.likelihood.views import build_batch
from learner.reporting.playback import context_of
from learner.supply.problems import fitting
from learner.verification.parity import recorded_states
from rewards.errors import ConfigError, DataError, TrajectoryError
from rewards.infill import SEPARATOR, contents, infill
from rewards.task import Problem
from rollout.engines.torch import TorchEngine
from rollout.generate import main as generate
from rollout.models.encoding import completion_text, encode, load_tokenizer
from rollout.models.tokenizer import build_tokenizer
from rollout.spans import Gap, places, positions_needed, prompt_places
from rollout.trajectory import GroupSpec, SamplerSpec, TrajectoryGroup
from tests.support.gapped import Gapped
from tests.support.small_masked_lms import SIZES, masked_tokenizer, write_masked_lm
from tests.support.small_policies import FAMILIES, write_policy

MASKED = tuple(family for family in SIZES if family not in FAMILIES)
GAPS = (Gap(2, (3, 5)), Gap(4, (4,)))
PROMPT = [10, 11, 12, 13, 14]
SAMPLER = SamplerSpec(12, 12, 6, "random", 0.8, 20, 0.95)


# ---- what a task says


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        (("a", "b"), "without a gap"),
        (("a", 0), "a gap of 0 tokens"),
        (("a", []), "a gap of \\[\\] tokens"),
        (("a", 3.5), "a gap of 3.5 tokens; give a whole number"),
        (("a", ["3"]), "a gap of \\['3'\\] tokens"),
        (("a", True), "a gap of True tokens"),
        (("a", 3, [2, 4], "b"), "no text between two gaps, of \\[3\\] and \\[2, 4\\] tokens"),
    ],
)
def test_a_text_that_has_no_sense_as_one_with_gaps_is_refused(parts: tuple[Any, ...], fault: str) -> None:
    with pytest.raises(DataError, match=fault):
        infill(*parts)


def test_a_form_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="of the form 'sinlge'; take chat, plain, single"):
        infill("a", 3, form="sinlge")  # type: ignore[arg-type]


def test_what_people_see_of_a_prompt() -> None:
    (question,) = Gapped().messages({"letter": "b", "n": 3})[-1:]
    assert question == {"role": "user", "content": "bbb … bbbb … b"}


# ---- tokens


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def test_the_forms_of_a_masked_language_model() -> None:
    tokenizer: Any = masked_tokenizer("bert")
    asked = [{"role": "user", "content": "ab"}]
    single = encode(tokenizer, infill("cd", 3, "e", form="single"))
    assert [text(tokenizer, [token]) for token in single.ids] == ["[CLS]", "c", "d", "e", "[SEP]"]
    assert single.gaps == (Gap(3, (3,)),)
    plain = encode(tokenizer, infill("cd", [2, 3], "e", messages=asked, form="plain"))
    assert text(tokenizer, plain.ids).replace(" ", "") == "[CLS]ab[SEP]cde[SEP]"
    assert plain.gaps == (Gap(6, (2, 3)),)
    assert encode(tokenizer, infill("cd", [2, 3], "e", messages=asked)) == plain, "no chat template"
    joined = encode(tokenizer, infill("cd", 1, messages=asked, form="single"))
    assert text(tokenizer, joined.ids).replace(" ", "") == "[CLS]abcd[SEP]" and joined.gaps == (Gap(5, (1,)),)


def test_a_chat_has_the_text_as_the_assistants_turn_and_its_end_behind_it() -> None:
    tokenizer: Any = build_tokenizer()
    asked = [{"role": "user", "content": "why"}]
    found = encode(tokenizer, infill("x", 2, "y", messages=asked))
    whole = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": "xy"}], tokenize=False, add_generation_prompt=False
    )
    assert tokenizer.decode(found.ids) == whole
    (gap,) = found.gaps
    assert tokenizer.decode(found.ids[: gap.before]).endswith("x") and gap.lengths == (2,)
    spelled = encode(tokenizer, infill(tokenizer.mask_token, 2, "y", messages=asked))
    assert tokenizer.mask_token_id not in spelled.ids, "a text that spells a mask is no hole"


def test_no_token_between_two_gaps_is_refused() -> None:
    tokenizer: Any = masked_tokenizer("bert")
    with pytest.raises(ConfigError, match="makes no token"):
        encode(tokenizer, infill("a", 2, "", 2, form="single"))


def test_the_contents_of_gaps_are_joined_by_a_sign_that_none_of_them_holds() -> None:
    tokenizer: Any = build_tokenizer()
    place_C = np.array([1, 2, 4, -1])
    ids = [*tokenizer.encode("ab", add_special_tokens=False), tokenizer.encode("c", add_special_tokens=False)[0], 0]
    assert completion_text(tokenizer, ids, place_C) == f"ab{SEPARATOR}c"
    assert contents(f"ab{SEPARATOR}c") == ["ab", "c"] and contents("ab") == ["ab"]


# ---- positions


def test_positions_take_the_gaps_in_order_and_blocks_lie_within_a_gap() -> None:
    gaps = (Gap(2, (3,)), Gap(4, (4,)))
    assert places(gaps, 12, 12, key=1).tolist() == [2, 3, 4, 7, 8, 9, 10, -1, -1, -1, -1, -1]
    assert places(gaps, 4, 12, key=1).tolist() == [2, 3, 4, -1, 7, 8, 9, 10, -1, -1, -1, -1]
    assert positions_needed(gaps, 12, 12) == 7 and positions_needed(gaps, 4, 12) == 8
    assert prompt_places(places(gaps, 4, 12, key=1), 5).tolist() == [0, 1, 5, 6, 11]
    assert prompt_places(None, 3).tolist() == [0, 1, 2]


def test_lengths_are_drawn_alike_and_by_the_completions_own_key() -> None:
    counts = [int((places(GAPS, 12, 12, key=key) >= 0).sum()) for key in range(400)]
    assert set(counts) == {7, 9} and 150 < counts.count(7) < 250
    assert counts == [int((places(GAPS, 12, 12, key=key) >= 0).sum()) for key in range(400)]


# ---- the engine


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {family: tmp_path_factory.mktemp(family) for family in (*FAMILIES, *MASKED)}
    for family, folder in folders.items():
        if family in FAMILIES:
            write_policy(folder, family)
        else:
            write_masked_lm(folder, family)
    return {family: str(folder) for family, folder in folders.items()}


def drawn(path: str, sampler: SamplerSpec = SAMPLER) -> tuple[TorchEngine, list[TrajectoryGroup]]:
    engine = TorchEngine(model_path=path, lora=None, max_rows=3, threads=1)
    specs = [GroupSpec(i, Problem(str(i), {}), 4, 7 + i) for i in range(3)]
    return engine, engine.generate(specs, [PROMPT, [9, *PROMPT], PROMPT[:3]], sampler, gaps=[GAPS, GAPS, ()])


def replay_error(engine: TorchEngine, groups: list[TrajectoryGroup], *, sees_pads: bool = False) -> float:
    """Of recorded log-probs, the largest."""
    family = engine.family
    views = recorded_states(groups)
    batch = build_batch(views, groups, mask_id=family.mask_token_id, pad_id=family.pad_token_id)
    batch = dataclasses.replace(batch, attention_mask=None) if sees_pads else batch
    with torch.no_grad():
        scores = score(engine.model, batch, family=family)
    assert batch.logp is not None and batch.logp.size == sum(int(group.drawn.sum()) for group in groups)
    return float(np.abs(scores.logp_N.numpy() - batch.logp).max())


@pytest.mark.parametrize("family", (*FAMILIES, *MASKED))
def test_every_family_fills_gaps_and_the_learner_finds_its_log_probs_again(
    policies: dict[str, str], family: str
) -> None:
    engine, groups = drawn(policies[family])
    for group in groups:
        group.validate()
    assert groups[2].places is None and groups[0].places is not None
    assert replay_error(engine, groups) < 1e-5
    assert replay_error(engine, groups, sees_pads=True) > 1e-3, "a control: texts have other lengths"
    # Controls: other text on the right of the gaps, or the same tokens elsewhere, are found out.
    for group in groups[:2]:
        ids = group.prompt_ids.copy()
        ids[-1] += 1
        assert replay_error(engine, [dataclasses.replace(group, prompt_ids=ids)]) > 1e-3
        behind = np.where(group.there, group.prompt_ids.size + np.cumsum(group.there, 1) - 1, -1).astype(np.int32)
        assert replay_error(engine, [dataclasses.replace(group, places=behind)]) > 1e-3


@pytest.mark.parametrize("rule", ["low_confidence", "decoupled_confidence", "left_to_right"])
def test_blocks_of_gaps_are_written_one_after_the_other(policies: dict[str, str], rule: Any) -> None:
    sampler = dataclasses.replace(SAMPLER, block_length=4, steps=6, position_rule=rule)
    gaps = (Gap(1, (3,)), Gap(3, (6,)))
    engine = TorchEngine(model_path=policies["llada"], lora=None, max_rows=3, threads=1)
    (group,) = engine.generate([GroupSpec(0, Problem("p", {}), 5, 3)], [PROMPT], sampler, gaps=[gaps])
    group.validate()
    assert group.there.sum(axis=1).tolist() == [9] * 5 and group.nfe.tolist() == [2 + 2 + 1] * 5
    blocks = [group.unmask_step[:, start : start + 4] for start in (0, 4, 8)]
    last = [np.where(block >= 0, block, -1).max(axis=1) for block in blocks]
    first = [np.where(block >= 0, block, 99).min(axis=1) for block in blocks]
    assert (last[0] < first[1]).all() and (last[1] < first[2]).all()
    assert replay_error(engine, [group]) < 1e-5


def test_an_eos_in_a_gap_ends_nothing(policies: dict[str, str]) -> None:
    engine = TorchEngine(model_path=policies["llada"], lora=None, max_rows=4, threads=1)
    eos = engine.family.eos_token_id

    def eos_alone(module: Any, args: Any, output: Any) -> Any:
        output.logits[:, :] = -30.0
        output.logits[:, eos] = 30.0
        return output

    hook = engine.model.register_forward_hook(eos_alone)
    sampler = dataclasses.replace(SAMPLER, block_length=4, steps=6)
    spec = [GroupSpec(0, Problem("p", {}), 2, 3)]
    (filled,) = engine.generate(spec, [PROMPT], sampler, gaps=[(Gap(1, (4,)), Gap(3, (4,)))])
    (ended,) = engine.generate(spec, [PROMPT], sampler)
    hook.remove()
    assert (filled.drawn == filled.there).all() and (filled.completion_ids[filled.there] == eos).all()
    assert not ended.drawn[:, 4:].any(), "control: behind its prompt a text ends"
    assert not filled.text_tokens([eos]).any()


def test_what_a_group_says_of_places_is_checked(policies: dict[str, str], tmp_path: Path) -> None:
    _, (group, *_) = drawn(policies["llada"])
    assert group.places is not None
    group.save(tmp_path / "group")
    again = TrajectoryGroup.load(tmp_path / "group")
    assert again.places is not None and (again.places == group.places).all()
    beyond = group.places.copy()
    beyond[0, group.there[0].sum() - 1] = 99
    back = group.places[:, ::-1].copy()
    for wrong in (beyond, back, group.places.astype(np.int64), np.full_like(group.places, -1)):
        with pytest.raises(TrajectoryError):
            dataclasses.replace(group, places=wrong).validate()
    with pytest.raises(TrajectoryError, match="has no position"):
        dataclasses.replace(group, drawn=np.ones_like(group.drawn)).validate()


def test_playback_has_the_text_around_the_gaps(policies: dict[str, str]) -> None:
    engine, (group, *_) = drawn(policies["llada"])
    tokenizer = engine.tokenizer
    first = int((group.there[0]).sum()) - 4
    texts = [tokenizer.decode(PROMPT[a:b]) for a, b in ((0, 2), (2, 4), (4, 5))]
    assert context_of(group, 0, tokenizer) == [
        {"before": before, "text": text} for before, text in zip((0, first, first + 4), texts, strict=True)
    ]


# ---- before a run, and by hand


def test_gaps_that_have_no_room_are_refused_before_a_run(policies: dict[str, str]) -> None:
    tokenizer, problems = load_tokenizer(policies["llada"]), Gapped().problems("train", seed=0, size=3)
    room: dict[str, Any] = {"task": Gapped(), "tokenizer": tokenizer, "longest": None}
    assert fitting(problems, completion_length=9, **room) == problems
    with pytest.raises(ConfigError, match="the gaps of problem train-0 take 9 positions, and .*completion_length is 8"):
        fitting(problems, completion_length=8, **room)
    with pytest.raises(ConfigError, match="take 11 positions"):  # a block of 4 for each begun four
        fitting(problems, completion_length=8, block_length=4, **room)


def test_several_thresholds_want_a_prompt_without_gaps(policies: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="prompts without gaps"):
        drawn(policies["llada"], dataclasses.replace(SAMPLER, threshold=(0.1, 0.9)))


def test_a_text_with_gaps_by_hand(policies: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--model", policies["llada"], "--json", "--samples", "2", "--temperature", "1"]
    assert generate([*command, "--infill", '["abc", 3, "de", [1, 2], "f"]', "--form", "plain"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sampler"]["completion_length"] == told["sampler"]["steps"] == 5
    assert all(SEPARATOR in completion["text"] for completion in told["completions"])
    assert (
        generate([*command, "--infill", '["abc", 3, "de", [1, 4], "f"]', "--form", "plain", "--block-length", "4"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["sampler"]["completion_length"] == 8, "whole blocks"
    lengths = {len(completion["tokens"]) for completion in told["completions"]}
    assert lengths <= {4, 7} and all(token["step"] for each in told["completions"] for token in each["tokens"])
    command[1] = policies["dream"]
    assert generate([*command, "--infill", '[3, "abc"]', "--form", "plain"]) == 2
    assert "begin the text with something" in capsys.readouterr().err
    command[1] = policies["llada"]
    for wrong in ('["abc"]', '{"a": 1}', "[1.5]", "nothing", "[3, 4]"):
        assert generate([*command, "--infill", wrong]) == 2, wrong
        assert len(capsys.readouterr().err.splitlines()) == 1
