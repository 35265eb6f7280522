"""The key that a person would have meant, and values that YAML 1.1 reads as nobody means them."""

from pathlib import Path

import pytest

from learner.evaluation.settings import EvaluateConfig
from learner.finetuning.settings import SftConfig
from learner.settings.arguments import leaf_fields, read_recipe, unknown_key
from learner.settings.nearest import _ELSEWHERE
from learner.settings.run import RunConfig, load_config
from rewards.errors import ConfigError


@pytest.mark.parametrize(
    "given, meant",
    [
        ("learner.learning_rate", "learner.lr"),
        ("learning_rate", "learner.lr"),
        ("learning-rate", "learner.lr"),
        ("lr", "learner.lr"),
        ("learner.lrr", "learner.lr"),
        ("run.temperature", "rollout.sampler.temperature"),
        ("temprature", "rollout.sampler.temperature"),
        ("num_generations", "rollout.group_size"),
        ("per_device_train_batch_size", "rollout.prompts_per_iteration"),
        ("max_steps", "run.iterations"),
        ("lora.rank", "lora.r"),
        ("lora.lora_alpha", "lora.alpha"),
        ("max_completion_length", "rollout.sampler.completion_length"),
        ("decay_rates", "learner.betas"),
        ("kl_coef", "objective.beta"),
        ("output_dir", "run.dir"),
        ("section", None),
        ("foo", None),
    ],
)
def test_what_was_meant(given: str, meant: str | None) -> None:
    remedy = f"did you mean '{meant}'?" if meant else "see --help for the keys"
    assert unknown_key(given, RunConfig) == f"unknown key '{given}'; {remedy}"


def test_a_fine_tuning_means_its_own() -> None:
    assert "'sft.batch'" in unknown_key("train_batch_size", SftConfig)
    assert "'sft.epochs'" in unknown_key("num_train_epochs", SftConfig)
    assert "'data.train'" in unknown_key("dataset", SftConfig)


@pytest.mark.parametrize("name", sorted(_ELSEWHERE))
def test_every_name_from_elsewhere_leads_to_a_key(name: str) -> None:
    keys = {key for model in (RunConfig, SftConfig) for key, _ in leaf_fields(model)}
    for end in _ELSEWHERE[name].split():
        assert any(f".{key}".endswith(f".{end}") for key in keys), end


@pytest.mark.parametrize(
    "argument, said",
    [
        ("task.train_size=010", 'task.train_size="010" must be a whole number'),
        ("timeouts.start=10:00", 'timeouts.start="10:00" must be a number'),
        ("timeouts.start=1:30.5", 'timeouts.start="1:30.5" must be a number'),
        ("evaluation.step_divisors=[1, 02]", 'evaluation.step_divisors.1="02" must be a whole number'),
    ],
)
def test_octal_and_sexagesimal_numbers_are_refused(argument: str, said: str) -> None:
    with pytest.raises(ConfigError) as told:
        load_config(["recipe=smoke", argument])
    assert str(told.value) == said


def test_the_same_in_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "Mine.YAML"
    path.write_text("extends: smoke\ntask: {train_size: 0100}\n")
    with pytest.raises(ConfigError, match='task.train_size="0100" must be a whole number'):
        load_config([f"recipe={path}"])


@pytest.mark.parametrize(
    "text, value",
    [
        ("10", 10),
        ("1e3", 1000.0),
        ("1.5e-3", 0.0015),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0", 0),
        ("1_000", 1000),
        ("0x10", 16),
    ],
)
def test_other_numbers_are_what_they_were(text: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(f"n: {text}\nm: [{text}]\n")
    assert read_recipe(str(path)) == {"n": value, "m": [value]}


def test_a_recipe_without_its_key_is_told() -> None:
    for name in ("sudoku", "sft_d1_s1k", "mine.yaml"):
        with pytest.raises(ConfigError, match=f"'{name}' is a recipe: write recipe={name}"):
            load_config([name])


@pytest.mark.parametrize(
    "model, key",
    [
        *((RunConfig, key) for key in ("run.dir", "run.resume", "task.train_path", "task.test_path", "model.path")),
        *((RunConfig, key) for key in ("model.cache_dir", "lora.adapter")),
        *((SftConfig, key) for key in ("data.train", "data.held_out", "run.dir", "model.path")),
        *((EvaluateConfig, key) for key in ("adapter", "out", "data.path")),
    ],
)
def test_every_path_may_begin_with_the_home(model: type, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    needed: dict = {"data": {"train": "x"}, "model": {"path": "y"}} if model is SftConfig else {}
    section, _, name = key.rpartition(".")
    settings = needed | ({section: needed.get(section, {}) | {name: "~/there"}} if section else {name: "~/there"})
    value = model.model_validate(settings)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == "/home/me/there"


def test_a_recipe_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("extends: smoke\n")
    assert load_config(["recipe=~/mine.yaml"]) == load_config(["recipe=smoke"])
