"""The simulated control plane: what it computes is right where it can be computed by hand, and repeats by seed."""

import json
from pathlib import Path
from typing import Any

import pytest

from learner.settings.run import dump_config, load_config
from learner.simulate import main
from learner.simulation.replay import Figures, simulate
from learner.simulation.search import advise
from learner.simulation.settings import load_simulation
from learner.simulation.times import Times, measured_by, times_of
from rewards.errors import ConfigError, DataError

EVEN = {"lease_spread": 0.0, "update_spread": 0.0}
SETTINGS = (
    "recipe=smoke", "iterations=16", "rollout.prompts_per_iteration=16", "rollout.groups_per_lease=4",
    "controller_groups_per_s=1e9",
)  # fmt: skip


def figures(actors: int, *settings: str, **times: Any) -> Figures:
    """Leases of 1 s, updates of 2 s, publishing 0.5 s unless it is said otherwise."""
    about = {
        "lease_s": 1.0, "lease_spread": 0.2, "load_s": 0.0, "update_s": 2.0, "update_spread": 0.1, "publish_s": 0.5,
        "adapter_mb": 0.0, "group_mb": 0.0, "sources": {},
    }  # fmt: skip
    return simulate(load_simulation([*SETTINGS, *settings], None)[0], Times(**(about | times)), actors)


@pytest.mark.parametrize(("actors", "rollout_s"), [(1, 4.0), (2, 2.0), (3, 2.0), (4, 1.0), (5, 1.0)])
def test_a_synchronous_run_without_spread_is_its_parts_one_after_the_other(actors: int, rollout_s: float) -> None:
    found = figures(actors, "rollout.max_staleness=0", **EVEN)
    seconds = rollout_s + 2.0 + 0.5
    assert found.groups_per_s == pytest.approx(16 / seconds)
    assert found.learner_idle == pytest.approx(1 - 2.0 / seconds)
    assert found.learner_waits == pytest.approx(rollout_s / seconds)
    assert found.actors_idle == pytest.approx(1 - 4.0 / (actors * seconds))
    assert found.staleness == {0: 1.0}


def test_an_asynchronous_run_is_as_fast_as_its_slower_side() -> None:
    slow = figures(1, "rollout.max_staleness=2", publish_s=0.0, **EVEN)  # 4 s an iteration, and 2 s on the ranks
    assert slow.groups_per_s == pytest.approx(16 / 4.0, rel=0.03) and slow.limit == "actors"
    fast = figures(4, "rollout.max_staleness=2", **EVEN)  # 1 s, and 2.5 s on the ranks
    assert fast.groups_per_s == pytest.approx(16 / 2.5, rel=0.001)
    # Negative control: the same actors in a synchronous run.
    assert figures(4, "rollout.max_staleness=0", **EVEN).groups_per_s < 0.8 * fast.groups_per_s


def test_what_a_new_version_allows_is_leased_in_the_first_pump_of_an_update() -> None:
    found = figures(4, "rollout.max_staleness=1", lease_s=0.5, update_s=0.6, publish_s=0.0, **EVEN)
    assert found.groups_per_s == pytest.approx(16 / 0.6, rel=0.01), "leases waited for more than a pump"


def test_staleness_keeps_its_bound_and_is_told_by_share() -> None:
    for most in (0, 1, 3):
        found = figures(4, f"rollout.max_staleness={most}")
        assert max(found.staleness) <= most and sum(found.staleness.values()) == pytest.approx(1)
        assert found.staleness_mean == pytest.approx(sum(v * share for v, share in found.staleness.items()))


def test_it_repeats_by_seed() -> None:
    faults = ("mean_time_between_failures_s=20", "replace_s=3", "slow=0.5")
    assert figures(3, *faults) == figures(3, *faults)
    assert figures(3, *faults) != figures(3, *faults, "run.seed=1")


def test_failures_cost_what_is_in_flight_and_no_more() -> None:
    without = figures(4, "rollout.max_staleness=1")
    settings = ("rollout.max_staleness=1", "mean_time_between_failures_s=15", "replace_s=5")
    some = figures(4, *settings)
    assert some.failures > 3 and some.leases_again > 0 and some.actors_away > 0.05
    assert 0.3 * without.groups_per_s < some.groups_per_s < without.groups_per_s
    hung = figures(4, *settings, "hangs=1", "timeouts.heartbeat=20")
    assert hung.groups_per_s < some.groups_per_s, "a hang is found after a while only"
    assert hung.actors_away > some.actors_away
    by_the_lease = figures(4, *settings, "hangs=1", "timeouts.heartbeat=600", "timeouts.lease=20")
    late = figures(4, *settings, "hangs=1", "timeouts.heartbeat=600", "timeouts.lease=600")
    assert late.groups_per_s < 0.5 * by_the_lease.groups_per_s < hung.groups_per_s


def test_the_fastest_idle_actor_gets_the_next_lease() -> None:
    """Of two actors that both could do an iteration's only lease, the slow one does one and then none."""
    settings = ("rollout.prompts_per_iteration=2", "rollout.groups_per_lease=2", "slow=0.5", "slow_by=10", "run.seed=1")
    both, fast = figures(2, *settings), figures(1, *settings[:2])
    assert both.groups_per_s > 0.9 * fast.groups_per_s


def test_second_leases_help_against_slow_actors() -> None:
    slow = ("rollout.max_staleness=1", "slow=0.3", "slow_by=10")
    assert figures(5, *slow, "rollout.second_lease_after_s=2").groups_per_s > 1.3 * figures(5, *slow).groups_per_s


@pytest.mark.parametrize(
    ("limit", "actors", "settings", "times"),
    [
        ("actors", 1, ("rollout.max_staleness=3",), {"publish_s": 0.0}),
        ("learner", 16, ("rollout.max_staleness=3",), {"publish_s": 0.0}),
        (
            "controller",
            16,
            ("rollout.max_staleness=3", "controller_groups_per_s=3"),
            {"update_s": 0.1, "publish_s": 0.0},
        ),
        ("network", 16, ("rollout.max_staleness=3", "link_mb_s=10"), {"group_mb": 100.0}),
        ("staleness", 4, ("rollout.max_staleness=0",), {}),
    ],
)
def test_it_says_what_binds(limit: str, actors: int, settings: tuple[str, ...], times: dict[str, float]) -> None:
    assert figures(actors, *settings, **times).limit == limit


def test_each_node_gets_a_version_once() -> None:
    settings = ("rollout.max_staleness=0", "actors_per_node=2", "rollout.groups_per_lease=1")
    one, four = (figures(n, *settings, adapter_mb=80.0, **EVEN) for n in (2, 8))
    of_one, of_four = (found.network_mb_s / found.iterations_per_hour * 3600 for found in (one, four))
    assert of_one == pytest.approx(80) and of_four == pytest.approx(4 * 80)


def test_it_advises_actors_and_the_staleness_that_they_need() -> None:
    def asked(*settings: str, **times: float) -> Any:
        config = load_simulation([*SETTINGS, *settings], None)[0]
        about = {"load_s": 0.0, "publish_s": 0.05, "adapter_mb": 0.0, "group_mb": 0.0, "lease_s": 1.0, "update_s": 2.0}
        return advise(config, Times(**{"lease_spread": 0.2, "update_spread": 0.1, "sources": {}, **about, **times}))

    found = asked("rollout.max_staleness=0")
    assert found.now.figures.idlest > 0.3
    assert not found.now.enough and found.with_more.enough and found.with_more.max_staleness > 0
    assert found.with_more.figures.actors == 2 and found.with_more.figures.idlest <= 0.1
    assert asked("rollout.max_staleness=4").now.enough
    never = asked("rollout.max_staleness=0", publish_s=2.0)
    assert not never.now.enough and never.with_more is None


# ---- where the times are from


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder: four leases an iteration on two actors."""
    config = load_config(["recipe=smoke", "rollout.prompts_per_iteration=16", "rollout.groups_per_lease=4"])
    (tmp_path / "config.json").write_text(dump_config(config))
    rows = [
        {
            "iteration": number, "time/lease/load_s": 0.5, "time/lease/generate_s": generate, "time/publish_s": 0.25,
            "time/lease/grade_wait_s": 0.5, "time/update_s": 3.0,
        }
        for number, generate in enumerate((99.0, 1.0, 2.0, 3.0))
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_run_says_its_service_times(run: Path) -> None:
    config, before = load_simulation(["update_spread=0.5"], run)
    times = times_of(config, run, before, None)
    assert times.lease_s == 2.5 and times.update_s == 3.0 and times.publish_s == 0.25
    assert times.lease_spread == pytest.approx(2 * 1.0 / 2.5), "of single leases, not of an iteration's mean"
    assert times.load_s == 1.0, "two of four leases load"
    assert times.update_spread == 0.5 and times.sources["update_spread"] == "given"
    assert times.sources["lease_s"] == "the run" and times.sources["group_mb"] == "learner.plan"


def test_a_runs_times_follow_the_settings(run: Path) -> None:
    config, before = load_simulation(["rollout.prompts_per_iteration=32", "rollout.groups_per_lease=2"], run)
    times = times_of(config, run, before, None)
    assert times.lease_s == 1.25 and times.update_s == 6.0


def test_what_cannot_be_measured_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe=smoke"):
        load_simulation(["recipe=smoke"], run)
    with pytest.raises(ConfigError, match="no run's folder"):
        load_simulation([], run / "absent")
    with pytest.raises(ConfigError, match=r"one_process=true makes.*give resources.one_process=false"):
        load_simulation(["resources.one_process=true", "rollout.actors=1"], run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="0 finished iterations"):
        measured_by(run, load_simulation([], run)[0])


def test_the_command_prints_a_table_and_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(run), "actors=[1,2]", "iterations=4", "group_mb=1", "adapter_mb=1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "learner" in text.splitlines()[0] and "(the run)" in text
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["actors"] for row in found["rows"]] == [1, 2]
    assert found["times"]["lease_s"] == 2.5 and found["advice"]["now"]["figures"]["groups_per_s"] > 0


@pytest.mark.slow
def test_real_actors_without_a_model_do_what_the_simulation_says() -> None:
    import dataclasses
    import logging

    from learner.bench import scaling
    from learner.runs.local_ray import local_ray

    size = dataclasses.replace(scaling.FULL, group=scaling.SMALL.group, iterations=5)
    with local_ray(num_cpus=4, object_store_memory=10**8, logging_level=logging.ERROR):
        found = scaling.compare(4, 1, size)
    assert abs(found["error"]) < scaling.LARGEST_ERROR, found
