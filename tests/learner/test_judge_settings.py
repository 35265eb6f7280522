"""A run's judge: its settings, and that one which doesn't answer ends a run before it begins."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from learner.evaluation.drive import result_settings
from learner.evaluation.settings import load_evaluation
from learner.settings.run import dump_config, load_config, load_dumped
from learner.supply.judging import tried_judge
from rewards.errors import ConfigError
from rewards.judge.settings import UNJUDGED
from rewards.task import Problem
from tests.support.judges import JudgeServer, body, chat, judge_server
from tests.support.judges import settings as quick

JUDGED = ["recipe=smoke", "task.judge.model=tiny", "task.judge.rubric=It is clear: 5.", "rollout.grade_timeout_s=62"]
PROBLEMS = [Problem("a", {"puzzle": "1", "solution": "2"})]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("UNMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rewards.judge.client._FIRST_PAUSE_S", 0.02)
    with judge_server() as judge:
        yield judge


def test_a_judge_makes_a_part_of_the_reward(tmp_path: Path) -> None:
    config = load_config([*JUDGED, "task.judge.request={max_tokens: null, top_p: 0.5}", "task.judge.fields=[solution]"])
    assert config.task.load().components == ("length", "permutation", "clues", "cells", "judge")
    assert config.task.judge.request == {"max_tokens": None, "top_p": 0.5} and config.task.judge.fields == ("solution",)
    (tmp_path / "config.json").write_text(dump_config(config))
    assert load_dumped(tmp_path / "config.json") == config
    plain = load_config(["recipe=smoke"])
    assert plain.task.judge == UNJUDGED and plain.task.load().components == ("length", "permutation", "clues", "cells")


def test_a_config_of_before_there_were_judges(tmp_path: Path) -> None:
    data = json.loads(dump_config(load_config(["recipe=smoke"])))
    del data["task"]["judge"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_dumped(tmp_path / "config.json").task.judge == UNJUDGED


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("task.judge.rubric=", "task.judge.rubric is missing"),
        ("task.judge.model=", "task.judge.rubric is set and task.judge.model is not"),
        ("task.judge.url=localhost:8000", "task.judge.url must be an address such as http://127.0.0.1:8000/v1"),
        ("task.judge.url=ftp://judge/v1", "task.judge.url must be an address"),
        ("task.judge.url=http://host:port/v1", "task.judge.url must be an address"),
        ("task.judge.url=http://ho st/v1", "task.judge.url must be an address"),
        ("task.judge.url=http://h\u00f6st\x01/v1", "task.judge.url must be an address"),
        ("task.judge.url=https://me:sk-9999@judge/v1", "task.judge.url holds more than an address"),
        ("task.judge.url=https://judge/v1?key=sk-9999", "task.judge.url holds more than an address"),
        ("task.judge.key_variable=sk-9999", "task.judge.key_variable is no name of an environment variable"),
        ("task.judge.lowest=5", "task.judge.lowest=5 and task.judge.highest=5 make no scale"),
        ("task.judge.highest=101", "make no scale"),
        ("task.judge.highest=4.5", "task.judge.highest=4.5 must be a whole number"),
        ("task.judge.right_from=6", "task.judge.right_from=6 parts nothing"),
        ("task.judge.right_from=1", "task.judge.right_from=1 parts nothing"),
        ("task.judge.weight=0", "task.judge.weight=0 must be a number above 0"),
        ("task.judge.modell=x", "did you mean 'task.judge.model'?"),
        ("task.judge.request=5", "task.judge.request=5 must be a section of settings"),
        ("task.judge.timeout_s=90", "set it to 92 or more"),
        ("rollout.grade_timeout_s=61", "set it to 62 or more"),
    ],
)
def test_a_mistake_is_one_sentence(argument: str, told: str) -> None:
    with pytest.raises(ConfigError) as failed:
        load_config([*JUDGED, argument])
    assert told in str(failed.value) and "\n" not in str(failed.value) and "9999" not in str(failed.value)


def test_open_prompts_need_a_judge_and_its_verdict() -> None:
    for given, told in (
        (["recipe=smoke"], "only a judge can grade task open_prompts"),
        (JUDGED, "task.judge.right_from"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config([*given, "task.name=open_prompts"])
    assert load_config([*JUDGED, "task.name=open_prompts", "task.judge.right_from=4"]).task.load().components == (
        "judge",
    )


def test_the_judge_is_tried_before_a_run(server: JudgeServer) -> None:
    assert tried_judge(UNJUDGED, PROBLEMS) is None
    told = tried_judge(quick(server, fields=("solution",)), PROBLEMS)
    assert (
        told and f"judge tiny at {server.url} answers in" in told and told.endswith("its scores are numbers as written")
    )
    server.faults = [body(chat("4", logprobs={"4": -0.1, "5": -3.0}))]
    assert (tried_judge(quick(server), PROBLEMS) or "").endswith("its scores are expectations by log-probabilities")
    server.faults = [body(chat("Four."))]
    with pytest.raises(ConfigError, match="wrote 'Four.' and not one whole number; task.judge.url, model"):
        tried_judge(quick(server, cache=True), PROBLEMS)
    with pytest.raises(ConfigError, match="ConnectError"):
        tried_judge(quick(server, url="http://127.0.0.1:9/v1", tries=1), PROBLEMS)
    asked = len(server.asked)
    with pytest.raises(ConfigError, match="names proof, which problem a doesn't have; take of puzzle, solution"):
        tried_judge(quick(server, fields=("proof",)), PROBLEMS)
    assert len(server.asked) == asked


def test_an_evaluation_is_another_one_by_another_rubric() -> None:
    """And not by more patience; without a judge its settings are those of before there were judges."""
    plain, judged, patient, other = (
        result_settings(load_evaluation(arguments, None)[0], "model", None, PROBLEMS)
        for arguments in (
            ["recipe=smoke", "rollout.grade_timeout_s=62"],
            JUDGED,
            [*JUDGED, "task.judge.tries=9", "task.judge.cache=false"],
            [*JUDGED, "task.judge.rubric=It is short."],
        )
    )
    assert (
        "judge" not in plain
        and judged == patient != other
        and plain == {k: v for k, v in judged.items() if k != "judge"}
    )


def test_an_evaluation_may_ask_another_judge_or_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(dump_config(load_config(JUDGED)))
    moved, _ = load_evaluation(["task.judge.url=http://judge:9000/v1"], str(tmp_path))
    assert moved.task.judge.url == "http://judge:9000/v1" and moved.task.judge.model == "tiny"
    unjudged, _ = load_evaluation(["task.judge.model=null", "task.judge.rubric=null"], str(tmp_path))
    assert unjudged.task.load().components == ("length", "permutation", "clues", "cells")
    with pytest.raises(ConfigError, match="task.train_size says how"):
        load_evaluation(["task.train_size=3"], str(tmp_path))
