"""The settings as the form of a new run shows them."""

import pytest

from learner.finetuning.settings import load_sft_config
from learner.settings import arguments as overrides
from learner.settings.listing import listing
from learner.settings.run import load_config
from rewards.section import Section


@pytest.mark.parametrize(
    "config",
    [load_config(["recipe=smoke", "learner.lr=0.25"]), load_sft_config(["recipe=sft_d1_s1k", "learner.lr=0.25"])],
    ids=["learner.main", "learner.sft"],
)
def test_every_setting_is_listed_once_with_its_meaning_and_the_recipes_value(config: Section) -> None:
    items = listing(config)
    found = {each["key"]: each for each in items}
    keys = {key for key, _ in overrides.leaf_fields(type(config))}
    assert found.keys() == keys and len(items) == len(keys)
    assert [key for key, each in found.items() if not each["about"] or not each["type"]] == []
    values = overrides.flat(config.model_dump(mode="json"))
    assert {key: each["value"] for key, each in found.items() if key in values} == {
        key: value for key, value in values.items() if key in found
    }
    assert (found["learner.lr"]["value"], found["learner.lr"]["type"]) == (0.25, "number")


def test_settings_of_variants_say_which() -> None:
    found = {each["key"]: each for each in listing(load_config([]))}
    assert "wd1" in found["objective.type"]["choices"] and found["objective.type"]["belongs_to"] == []
    assert "objective.type=agrpo" in found["objective.clip_low"]["belongs_to"]
    assert found["learner.lr"]["belongs_to"] == []
    assert found["rollout.sampler.position_rule"]["choices"][0] == "random"
