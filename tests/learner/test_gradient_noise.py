"""Noise over signal of gradients whose law is known, and of a real run's."""

import json
from pathlib import Path

import numpy as np
import pytest

from learner.bench import gradient_noise
from learner.bench.noise import noise_over_signal


def gram(batches: int, signal: float, noise: float, *, size: int = 400, seed: int = 0) -> np.ndarray:
    """Of gradients with a mean of squared length ``signal`` and a covariance of this trace."""
    rng = np.random.default_rng(seed)
    mean_P = np.full(size, np.sqrt(signal / size))
    gradients_NP = mean_P + rng.normal(scale=np.sqrt(noise / size), size=(batches, size))
    return gradients_NP @ gradients_NP.T


@pytest.mark.parametrize("signal, noise", [(1.0, 0.5), (1.0, 4.0), (9.0, 2.0)])
def test_what_is_known_is_found_and_does_not_depend_on_the_losss_scale(signal: float, noise: float) -> None:
    found = noise_over_signal(gram(64, signal, noise))
    low, high = found["interval"]
    assert low < noise / signal < high and high / low < 2
    assert found["signal"] == pytest.approx(signal, rel=0.15) and found["noise"] == pytest.approx(noise, rel=0.15)
    scaled = noise_over_signal(49.0 * gram(64, signal, noise))
    assert scaled["value"] == pytest.approx(found["value"])
    biased = np.mean(gram(64, signal, noise))  # |mean gradient|^2 has a part of the noise in it
    assert biased > found["signal"], "control"


def test_intervals_hold_what_they_should() -> None:
    held = 0
    for seed in range(100):
        low, high = noise_over_signal(gram(24, 1.0, 3.0, seed=seed))["interval"]
        held += low < 3.0 < high
    assert held >= 85


def test_a_signal_that_is_lost_in_the_noise_is_said_to_be() -> None:
    found = noise_over_signal(np.eye(6) - 0.01)
    assert found["value"] is None and found["interval"][1] is None
    told = gradient_noise.told({"objective": "agrpo", "update_fe": 10.0, **found})
    assert "lost in the noise" in told and "unbounded" in told


@pytest.mark.slow
@pytest.mark.e2e
def test_a_real_runs_gradients(tmp_path: Path, bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two methods, by the command; it leaves nothing but its file."""
    monkeypatch.setenv("UNMASK_CACHE", str(bases))
    monkeypatch.chdir(tmp_path)
    found = {}
    for method in ("agrpo", "diffu_grpo"):
        out = tmp_path / f"{method}.json"
        settings = ["recipe=smoke", f"objective.type={method}", "rollout.actors=1"]
        assert gradient_noise.main([*settings, "--batches", "4", "--out", str(out)]) == 0
        found[method] = json.loads(out.read_text())
        assert found[method]["batches"] == 4 and found[method]["noise"] > 0 and found[method]["update_fe"] > 0
    assert found["agrpo"]["noise"] != found["diffu_grpo"]["noise"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agrpo.json", "diffu_grpo.json"]
