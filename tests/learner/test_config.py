"""learner.settings.run: recipes, overrides, and one sentence per mistake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from learner.settings import arguments as overrides
from learner.settings.run import (
    RunConfig,
    check_paths,
    check_resources,
    dump_config,
    help_text,
    in_ray_job,
    load_config,
    load_dumped,
    required_resources,
)
from learner.settings.sections import RunPlace
from rewards.errors import ConfigError
from rewards.section import Section


@pytest.mark.parametrize("name", overrides.recipe_names())
def test_every_recipe_loads_and_says_what_it_is(name: str) -> None:
    load_config([f"recipe={name}"])
    assert overrides.recipe_summary(name)


def test_shipped_recipes() -> None:
    assert {"sudoku", "countdown", "sudoku_async", "smoke"} <= set(overrides.recipe_names())
    assert load_config([]) == load_config(["recipe=sudoku"])
    assert load_config(["recipe=sudoku_async"]).rollout.max_staleness == 1


def test_extending_changes_only_what_it_names() -> None:
    base, child = (json.loads(dump_config(load_config([f"recipe={name}"]))) for name in ("sudoku", "sudoku_async"))
    assert child != base
    assert child.pop("rollout") == base.pop("rollout") | {"max_staleness": 1}
    assert child == base


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("learner.lr=1e-3", 1e-3),
        ("learner.lr=5E-6", 5e-6),
        ("learner.lr=.5e+0", 0.5),
        ("learner.lr=1", 1.0),
        ("lora.alpha=8", 8.0),
        ("learner.betas=[0.5, 1e-1]", (0.5, 0.1)),
        ("rollout.sampler.top_k=null", None),
        ("rollout.sampler.top_k=50", 50),
        ("objective.low_discrepancy=false", False),
        ("trackers=[tensorboard, wandb]", ("tensorboard", "wandb")),
        ("evaluation.step_divisors=[1, 2]", (1, 2)),
        ("run.name=007", "007"),
        ("run.name=2026-01-02", "2026-01-02"),
        ("run.name=null", None),
        ("run.dir=/data/a=b", "/data/a=b"),
        ("resources.ray_address=[::1]:6379", "[::1]:6379"),
        ("resources.ray_address=10.0.0.1:6379", "10.0.0.1:6379"),
    ],
)
def test_override_is_parsed_to_its_type(argument: str, expected: Any) -> None:
    value: Any = load_config([argument])
    for part in argument.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected
    assert type(value) is type(expected)


def test_a_section_override_is_merged_and_the_last_one_wins() -> None:
    config = load_config(["rollout.sampler={steps: 4, top_k: 3}", "rollout.sampler.top_k=5"])
    sampler = config.rollout.sampler
    assert (sampler.steps, sampler.top_k, sampler.completion_length) == (4, 5, 24)


def test_recipe_from_a_path_extends_a_shipped_one_and_a_neighbour(tmp_path: Path) -> None:
    (tmp_path / "lower.yaml").write_text("# lower\nextends: sudoku\nlearner: {lr: 2e-4}\nrun: {seed: 5}\n")
    (tmp_path / "upper.yaml").write_text("# upper\nextends: lower.yaml\nrun: {seed: 6}\n")
    config = load_config([f"recipe={tmp_path / 'upper.yaml'}"])
    assert (config.learner.lr, config.run.seed) == (2e-4, 6)


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config([f"recipe={tmp_path / 'a.yaml'}"])


# One row per kind of mistake: arguments, and what the sentence must say (the offending value, and the remedy).
MISTAKES = {
    "key without section": (["lr=1e-3"], ["unknown key 'lr'", "'learner.lr'"]),
    "misspelt key": (["rollout.actorz=3"], ["'rollout.actorz'", "'rollout.actors'"]),
    "misspelt section": (["rolout.actors=3"], ["'rolout'", "'rollout'"]),
    "key below a value": (["run.seed.x=3"], ["run.seed"]),
    "no equals sign": (["recipe"], ["'recipe'", "key.sub=value"]),
    "text for a number": (["run.seed=abc"], ['run.seed="abc"', "whole number"]),
    "quoted number": (["run.seed='3'"], ['run.seed="3"', "whole number"]),
    "bool for a number": (["run.seed=true"], ["run.seed=true", "whole number"]),
    "fraction for a whole number": (["run.iterations=1.5"], ["1.5", "whole number"]),
    "not finite": (["learner.lr=.nan"], ["learner.lr=NaN", "finite"]),
    "negative": (["run.seed=-1"], ["run.seed=-1", "at least 0"]),
    "number for a section": (["learner=3"], ["learner=3", "section"]),
    "null for a number": (["run.iterations=null"], ["null", "whole number"]),
    "unknown choice": (["objective.type=ppo"], ["ppo", "agrpo"]),
    "unknown tracker": (["trackers=[x]"], ["trackers.0", "tensorboard"]),
    "short list": (["learner.betas=[0.9]"], ["learner.betas.1", "missing"]),
    "long list": (["learner.betas=[0.9, 0.9, 0.9]"], ["at most 2"]),
    "empty list": (["evaluation.step_divisors=[]"], ["at least 1"]),
    "broken YAML": (["learner.betas=[1"], ["learner.betas", "not valid YAML"]),
    "key twice": (["run={seed: 1, seed: 2}"], ["'seed' is given twice"]),
    "unknown recipe": (["recipe=sudok"], ["'sudok'", ", sudoku_async"]),
    "missing recipe file": (["recipe=nowhere/x.yaml"], ["nowhere/x.yaml"]),
    "two recipes": (["recipe=sudoku", "recipe=smoke"], ["2 times", "give one"]),
    "name with a folder": (["run.name=../x"], ["run.name=../x", "letters"]),
    "name too long": (["run.name=" + "x" * 101], ["run.name=xx", "up to 100 letters"]),
    "bfloat16 without ZeRO": (["learner.dtype=bfloat16"], ["zero_stage=0", "take stage 1, 2 or 3"]),
    "temperature 0": (["rollout.sampler.temperature=0"], ["temperature=0", "above 0"]),
    "block does not divide C": (["rollout.sampler.block_length=7"], ["completion_length=24", "block_length=7"]),
    "blocks do not divide m": (["rollout.sampler.block_length=8"], ["steps=8", "take one of 3, 6, 12, 24"]),
    "m does not divide C": (["rollout.sampler.steps=7"], ["steps=7", "take one of 1, 2, 3"]),
    "more steps than tokens": (["rollout.sampler.steps=48"], ["steps=48", "completion_length=24"]),
    "divisor does not divide m": (["evaluation.step_divisors=[1, 3]"], ["holds 3", "divisors of 8"]),
    "no full evaluation": (["evaluation.step_divisors=[2]"], ["lacks 1"]),
    "top_p 0": (["rollout.sampler.top_p=0"], ["top_p=0", "above 0"]),
    "top_p above 1": (["rollout.sampler.top_p=1.5"], ["top_p=1.5", "at most 1"]),
    "top_k 0": (["rollout.sampler.top_k=0"], ["top_k=0", "above 0"]),
    "group of one": (["rollout.group_size=1"], ["group_size=1", "take 2 or more"]),
    "room for fewer actors": (["rollout.max_actors=1"], ["max_actors=1", "the 2 that rollout.actors asks for"]),
    "no actors": (["rollout.actors=0"], ["rollout.actors=0 must be a number above 0"]),
    "a range upside down": (["rollout.actors={min: 3, max: 2}"], ["rollout.actors.min=3", "rollout.actors.max=2"]),
    "half a range": (["rollout.actors.min=3"], ["rollout.actors.max is missing"]),
    "lease beyond the iteration": (["rollout.groups_per_lease=17"], ["groups_per_lease=17", "=16"]),
    "buffer below the iteration": (["rollout.buffer_groups=3"], ["buffer_groups=3", "at least"]),
    "ZeRO stage": (["learner.zero_stage=4"], ["zero_stage=4", "at most 3"]),
    "clip 0": (["objective.clip_low=0"], ["clip_low=0", "above 0"]),
    "weight floor": (["objective.weight_floor=2"], ["weight_floor=2", "at most 1"]),
    "GPUs for a CPU learner": (["resources.gpus_per_rank=1", "learner.device=cpu"], ["gpus_per_rank=1", "drop one"]),
    "two ranks on a GPU": (["learner.ranks=2", "resources.gpus_per_rank=0.5"], ["gpus_per_rank=0.5", "more than 0.5"]),
    "CUDA without a GPU": (["learner.device=cuda"], ["gpus_per_rank above 0"]),
    "Ray address": (["resources.ray_address=ray://x:1"], ["ray://x:1", "host:port"]),
    "more problems than there are": (["evaluation.problems=999"], ["problems=999", "test_size=256"]),
    "password in a URL": (["store.url=postgresql://me:hunter2@host/x"], ["store.url holds a password", "PGPASSWORD"]),
    "no run store": (["store.url=mysql://me:hunter2@host/x"], ["store.url=mysql... is no run store"]),
    "heads do not divide the width": (["model.base.n_heads=5"], ["d_model=128", "n_heads=5"]),
}


@pytest.mark.parametrize("arguments, fragments", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_gets_one_sentence_with_value_and_remedy(arguments: list[str], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    text = str(caught.value)
    assert all(fragment in text for fragment in fragments), text
    assert "hunter2" not in text
    assert len(text.splitlines()) == 1, text
    assert "validation error" not in text and "pydantic" not in text


def test_each_of_several_mistakes_gets_its_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["learner.lrr=1", "run.seed=x"])
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(ConfigError) as caught:
        load_config(["rollout.sampler.temperature=0", "rollout.buffer_groups=1"])
    assert len(str(caught.value).splitlines()) == 2


def test_sound_settings_pass_the_same_checks() -> None:
    load_config(
        ["rollout.sampler.block_length=8", "rollout.sampler.steps=12", "rollout.max_staleness=2"]
        + ["rollout.second_lease_after_s=3", "rollout.buffer_groups=16", "resources.gpus_per_rank=0.5"]
        + ["learner.device=cuda", "evaluation.step_divisors=[1, 4]"]
    )


def test_configuration_is_frozen_and_checked_when_built_directly() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.run.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="temperature=0"):
        RunConfig.model_validate({"rollout": {"sampler": {"temperature": 0}}})


def test_dump_reads_back_the_same_and_is_stable(tmp_path: Path) -> None:
    config = load_config(["recipe=countdown", "learner.lr=3e-4", "trackers=[wandb]", "rollout.sampler.top_p=0.95"])
    path = tmp_path / "config.json"
    path.write_text(dump_config(config))
    assert load_dumped(path) == config
    assert dump_config(load_dumped(path)) == dump_config(config)
    assert list(json.loads(path.read_text())) == list(RunConfig.model_fields)


@pytest.mark.parametrize("text", ["{", "[]", '{"run": {"sed": 1}}'])
def test_damaged_dump_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        load_dumped(path)


def test_help_lists_every_recipe_and_key_with_its_meaning() -> None:
    text = help_text()
    assert all(f"  {name}" in text for name in overrides.recipe_names())
    for key, field in overrides.leaf_fields(RunConfig):
        assert f"{key}=" in text
        assert field.description, f"{key} has no docstring"


def test_buffer_size_fills_in_its_default() -> None:
    assert load_config(["rollout.max_staleness=2"]).rollout.buffer_size == 48
    assert load_config(["rollout.buffer_groups=20"]).rollout.buffer_size == 20


def test_cache_folder_from_setting_environment_and_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "env"))
    assert load_config([f"model.cache_dir={tmp_path}"]).model.cache_path == tmp_path
    assert load_config([]).model.cache_path == tmp_path / "env"
    monkeypatch.delenv("UNMASK_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config([]).model.cache_path == tmp_path / ".cache" / "unmask"


def test_relative_paths_are_refused_inside_a_job_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_CACHE", "cache")
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    config = load_config(["run.dir=runs", "lora.adapter=a", f"model.path={tmp_path}", "run.resume=auto"])
    check_paths(config, in_job=False)
    with pytest.raises(ConfigError) as caught:
        check_paths(config, in_job=True)
    lines = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["run.dir=runs", "UNMASK_CACHE=cache", "lora.adapter=a"]
    assert all("absolute" in line for line in lines)
    monkeypatch.delenv("UNMASK_CACHE")
    check_paths(load_config(["run.dir=/data/runs"]), in_job=True)


def test_a_model_of_the_hub_is_no_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNMASK_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    config = load_config(["run.dir=/data/runs", "model.path=GSAI-ML/LLaDA-8B-Instruct"])
    check_paths(config, in_job=True)
    (tmp_path / "GSAI-ML" / "LLaDA-8B-Instruct").mkdir(parents=True)
    for path in (config.model.path, "./base", "runs/a/base", "base"):
        with pytest.raises(ConfigError, match="model.path=.*absolute"):
            check_paths(load_config(["run.dir=/data/runs", f"model.path={path}"]), in_job=True)


def test_a_data_set_of_the_hub_is_no_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNMASK_CACHE", raising=False)
    places = ["run.dir=/data/runs", "task.train_path=hub:openai/gsm8k:main:train"]
    check_paths(load_config([*places, "task.test_path=hub:openai/gsm8k:main:test"]), in_job=True)
    with pytest.raises(ConfigError, match="task.test_path=gsm8k.jsonl is relative"):
        check_paths(load_config([*places, "task.test_path=gsm8k.jsonl"]), in_job=True)


def test_what_is_to_be_read_and_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.csv").touch()
    there = [f"model.path={tmp_path}", "task.train_path=train.csv", f"lora.adapter={tmp_path}"]
    check_paths(load_config([*there, "run.dir=not/made/yet"]), in_job=False)
    absent = ["model.path=/no/model", "task.test_path=test.csv", "lora.adapter=/no-adapter", "run.resume=/no/run"]
    with pytest.raises(ConfigError) as caught:
        check_paths(load_config([*absent, "task.train_path=train.csv"]), in_job=False)
    told = sorted(str(caught.value).splitlines())
    assert told == sorted(f"{setting}: there is no such file or folder" for setting in absent)
    for path in ("./base", "runs/a/base"):
        with pytest.raises(ConfigError, match="no such file or folder"):
            check_paths(load_config([f"model.path={path}"]), in_job=False)
    for name in ("GSAI-ML/LLaDA-8B-Instruct", "bert-base-uncased"):
        check_paths(load_config([f"model.path={name}", "task.test_path=hub:openai/gsm8k:main:test"]), in_job=False)


def test_job_is_told_by_the_variable_that_ray_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not in_ray_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert in_ray_job()


def test_resources_that_ray_lacks_are_refused() -> None:
    config = load_config(["learner.ranks=2", "rollout.actors=2", "resources.gpus_per_rank=1"])
    assert required_resources(config) == (4.0, 2.0)
    check_resources(config, cpus=4, gpus=2)
    with pytest.raises(ConfigError, match="ask for 4 CPUs and Ray has 3"):
        check_resources(config, cpus=3, gpus=2)
    with pytest.raises(ConfigError, match="ask for 2 GPUs and Ray has 0.*gpus_per_rank"):
        check_resources(config, cpus=4, gpus=0)


def test_every_section_refuses_unknown_keys() -> None:
    def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
        below = [each for field in model.model_fields.values() for each in overrides.section_models(field)]
        return [model, *(inner for section in below if section for inner in sections(section))]

    assert len(sections(RunConfig)) > 10
    assert all(section.model_config["extra"] == "forbid" for section in sections(RunConfig))


def test_reading_a_configuration_loads_no_torch_and_no_ray() -> None:
    code = "import sys, learner.settings.run as c; c.load_config([]); print({'torch', 'ray'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == "set()"


class First(Section):
    """The first method."""

    type: Literal["first"] = "first"
    """The method."""
    k: int = 4
    """Shared."""
    only_first: float = 0.5
    """Of the first."""


class Second(Section):
    """The second method.

    With more to say.
    """

    type: Literal["second"] = "second"
    """The method."""
    k: int = 8
    """Shared, with another default."""
    masks: int = 2
    """Of the second."""


class WithVariants(Section):
    run: RunPlace = RunPlace()
    objective: Annotated[First | Second, Field(discriminator="type")] = First()


def of(*arguments: str) -> WithVariants:
    return overrides.settings_from_arguments(arguments, WithVariants, kind="run", default=None)


def test_a_section_with_variants_is_of_the_default_one_unless_it_says_so() -> None:
    assert of() == WithVariants()
    assert of("objective.k=3").objective == First(k=3)
    assert of("objective.masks=3", "objective.type=second").objective == Second(masks=3)


def test_another_variant_than_the_recipes_starts_the_section_anew(tmp_path: Path) -> None:
    """What a recipe set for one method isn't meant for another."""
    recipe, upper = tmp_path / "lower.yaml", tmp_path / "upper.yaml"
    recipe.write_text("objective: {type: first, k: 3, only_first: 0.25}\n")
    upper.write_text("extends: lower.yaml\nobjective: {type: second, masks: 4}\n")
    assert of(f"recipe={recipe}", "objective.type=second").objective == Second()
    assert of(f"recipe={recipe}", "objective.k=7", "objective.type=second").objective == Second(k=7)
    assert of(f"recipe={upper}").objective == Second(masks=4)
    assert of(f"recipe={recipe}", "objective.type=first").objective == First(k=3, only_first=0.25), "the control"


def test_the_help_has_a_heading_for_each_variant() -> None:
    lines = overrides.help_text(WithVariants, "run").splitlines()
    first, second = (lines.index(f"  with objective.type={name}: The {name} method.") for name in ("first", "second"))
    assert first < second
    assert any(line.startswith("  objective.only_first=0.5 ") for line in lines[first:second])
    assert any(line.startswith("  objective.k=8 ") for line in lines[second:])
    assert "with run" not in "\n".join(lines), "the control: a section without variants has no heading"


VARIANT_MISTAKES = [
    (["objective.mask=3", "objective.type=second"], "unknown key 'objective.mask'; did you mean 'objective.masks'?"),
    (["objective.masks=3"], "objective.masks is no setting of objective.type=first; see --help for those that are"),
    (["objective.type=third"], "objective.type=\"third\" must be 'first' or 'second'"),
    (["objective.k=x", "objective.type=second"], 'objective.k="x" must be a whole number'),
    (["objective=3"], "objective=3 must be a section of settings"),
]


@pytest.mark.parametrize(("arguments", "sentence"), VARIANT_MISTAKES, ids=[row[0][0] for row in VARIANT_MISTAKES])
def test_mistakes_in_a_section_with_variants_are_sentences(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        of(*arguments)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("arguments", "fewest", "wanted", "room"),
    [
        ([], 2, 2, 2),
        (["rollout.actors=4"], 4, 4, 4),
        (["rollout.actors={min: 1, max: 3}"], 1, 3, 3),
        (["rollout.actors.min=1", "rollout.actors.max=3"], 1, 3, 3),
        (["rollout.actors={min: 1, max: 3}", "rollout.max_actors=5"], 1, 3, 5),
    ],
)
def test_actors_are_a_number_or_a_range(
    tmp_path: Path, arguments: list[str], fewest: int, wanted: int, room: int
) -> None:
    config = load_config(["recipe=sudoku", *arguments])
    rollout = config.rollout
    assert (rollout.fewest_actors, rollout.wanted_actors, rollout.most_actors) == (fewest, wanted, room)
    assert required_resources(config)[0] == fewest + config.learner.ranks
    (tmp_path / "config.json").write_text(dump_config(config))
    assert load_dumped(tmp_path / "config.json") == config
