"""A short soak, and that it would see a loss."""

from pathlib import Path

import pytest

from learner.runs.directory import RunDirectory
from tests.chaos.soak import losses, soak
from tests.support.real_runs import Runs

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.heavy, pytest.mark.timeout(1500)]


def test_faults_at_random_cost_nothing_but_time(tmp_path: Path, bases: Path) -> None:
    done, lost = soak(tmp_path, seed=3, minutes=0.0, methods=("agrpo",), count=4, cache=bases)
    assert lost == [] and len(done) == 4


def test_a_loss_is_seen(runs: Runs, undisturbed: RunDirectory) -> None:
    runs.train("other-seed", "run.seed=5")
    runs.train("shorter", "run.iterations=5")
    assert losses(undisturbed, undisturbed) == []
    assert losses(runs["other-seed"], undisturbed) == ["rows of metrics.jsonl differ", "the adapter differs"]
    assert "groups were learned from twice, or not at all" in losses(runs["shorter"], undisturbed)
