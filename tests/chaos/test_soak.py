"""A short soak, and that it would see a loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from learner.runs.directory import RunDirectory
from tests.chaos.injections import Injected
from tests.chaos.soak import losses, soak, verdict
from tests.support.real_runs import Runs


def whole_runs(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.slow(pytest.mark.e2e(pytest.mark.timeout(1500)(test)))


@whole_runs
def test_faults_at_random_cost_nothing_but_time(tmp_path: Path, bases: Path) -> None:
    done, lost = soak(tmp_path, seed=3, minutes=0.0, methods=("agrpo",), count=3, iterations=60, cache=bases)
    assert lost == [] and len(done) == 3 and verdict(3, done, lost).endswith("3 recoveries, 0 losses: sound")


@pytest.mark.heavy
@whole_runs
def test_a_loss_is_seen(runs: Runs, undisturbed: RunDirectory) -> None:
    runs.train("other-seed", "run.seed=5")
    runs.train("shorter", "run.iterations=5")
    assert losses(undisturbed, undisturbed) == []
    assert losses(runs["other-seed"], undisturbed) == ["rows of metrics.jsonl differ", "the adapter differs"]
    assert "groups were learned from twice, or not at all" in losses(runs["shorter"], undisturbed)
    runs.train("twice", "run.iterations=5")
    runs.train("twice", "resume=auto")
    killed = Injected("actor", "killed", iteration=3, noticed_s=0.1, went_on_s=5.0, repeated=0)
    told = "the run was started again 1 times, for 0 faults that end its process"
    assert told in losses(runs["twice"], undisturbed, [killed])
    assert told not in losses(runs["twice"], undisturbed, [replace(killed, part="controller")])


def test_the_verdict_is_of_what_was_seen() -> None:
    actor = Injected("actor", "killed", iteration=3, noticed_s=0.1, went_on_s=5.0, repeated=0)
    rank = replace(actor, part="rank", noticed_s=None)
    assert verdict(1, [actor, rank, rank], []) == "seed 1: 3 faults (1 actor, 2 rank), 3 recoveries, 0 losses: sound"
    stuck = verdict(1, [actor, replace(rank, went_on_s=None)], [])
    assert stuck == "seed 1: 2 faults (1 actor, 1 rank), 1 recoveries, 0 losses: NOT SOUND"
    assert verdict(1, [actor], ["chaos-0-agrpo: the adapter differs"]).endswith("1 losses: NOT SOUND")
    assert verdict(1, [], []).endswith("NOT SOUND"), "nothing was tried"
