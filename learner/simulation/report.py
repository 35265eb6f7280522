"""A simulation as text for people and as JSON for programs."""

import dataclasses
import json
from collections.abc import Sequence

from learner.simulation.replay import Figures
from learner.simulation.search import Advice, Choice
from learner.simulation.settings import OWN, SimulationConfig
from learner.simulation.times import Times

HEAD = (
    f"{'actors':>7} {'groups/s':>9} {'iter/h':>8} {'actors':>7} {'learner':>8} {'away':>6} {'contr.':>7} {'link':>6} "
    f"{'net':>8} {'stale':>6}  limit",
    f"{'':>7} {'':>9} {'':>8} {'idle':>7} {'idle':>8} {'':>6} {'busy':>7} {'busy':>6} {'MB/s':>8} {'mean':>6}",
)
MEANING = {
    "actors": "the actors: more of them, or faster ones, make it faster",
    "learner": "the learner: more actors change nothing; more ranks do",
    "controller": "the controller's rate: larger leases (rollout.groups_per_lease) cost it less",
    "network": "the link of the ranks' node",
    "staleness": "neither side is busy, they wait for each other: rollout.max_staleness, or smaller leases",
}


def render(config: SimulationConfig, times: Times, rows: Sequence[Figures], advice: Advice) -> str:
    """The advice first, then the table and what it assumes."""
    limits = dict.fromkeys(row.limit for row in rows)
    lines = [
        *_advice(config, advice),
        "",
        *HEAD,
        *(_row(row) for row in rows),
        "",
        *(f"{limit:<11}{MEANING[limit]}" for limit in limits),
        "",
        *_assumed(config, times),
    ]
    return "\n".join(lines)


def as_json(config: SimulationConfig, times: Times, rows: Sequence[Figures], advice: Advice) -> str:
    """The same; times in seconds, sizes in 10^6 bytes, shares of 1."""
    data = {
        "advice": dataclasses.asdict(advice),
        "rows": [dataclasses.asdict(row) for row in rows],
        "times": dataclasses.asdict(times),
        "settings": {name: getattr(config, name) for name in OWN}
        | {
            f"rollout.{name}": getattr(config.rollout, name)
            for name in ("max_staleness", "prompts_per_iteration", "groups_per_lease", "second_lease_after_s")
        },
        "seed": config.run.seed,
    }
    return json.dumps(data, indent=2)


def _advice(config: SimulationConfig, advice: Advice) -> list[str]:
    limit, now = f"{config.most_idle:.0%}", advice.now
    if now.enough:
        return [f"take {_told(now)}: neither side is idle for more than {limit} of the time", _staleness(now)]
    lines = [
        f"no number of actors leaves both sides idle for at most {limit} as the settings are; best is {_told(now)}",
        _staleness(now),
    ]
    if advice.with_more is not None:
        more = advice.with_more
        lines += [f"with rollout.max_staleness={more.max_staleness}: {_told(more)}", _staleness(more)]
    else:
        lines.append(
            "more staleness does not help: publish_s and report_s keep the ranks waiting, or leases are too few"
        )
    return lines


def _told(choice: Choice) -> str:
    figures = choice.figures
    return (
        f"{figures.actors} actor{'s' if figures.actors > 1 else ''} ({figures.groups_per_s:.3g} groups/s; actors idle "
        f"{figures.actors_idle:.0%}, learner {figures.learner_idle:.0%})"
    )


def _staleness(choice: Choice) -> str:
    shares = [f"{share:.0%} by {versions}" for versions, share in choice.figures.staleness.items()]
    return f"  versions that its groups are behind: {', '.join(shares)}"


def _row(row: Figures) -> str:
    return (
        f"{row.actors:>7,} {row.groups_per_s:>9.3g} {row.iterations_per_hour:>8.4g} {row.actors_idle:>7.1%} "
        f"{row.learner_idle:>8.1%} {row.actors_away:>6.1%} {row.controller_busy:>7.1%} {row.link_busy:>6.1%} "
        f"{row.network_mb_s:>8.3g} {row.staleness_mean:>6.2f}  {row.limit}"
    )


def _assumed(config: SimulationConfig, times: Times) -> list[str]:
    rollout, source = config.rollout, times.sources
    lines = [
        "assumed",
        f"  lease    {times.lease_s:.3g} s of {rollout.groups_per_lease} groups ({source['lease_s']}), spread "
        f"{times.lease_spread:.0%} ({source['lease_spread']}); loading a version {times.load_s:.3g} s "
        f"({source['load_s']})",
        f"  learner  update {times.update_s:.3g} s of {rollout.prompts_per_iteration} groups ({source['update_s']}), "
        f"spread {times.update_spread:.0%} ({source['update_spread']}); publish {times.publish_s:.3g} s "
        f"({source['publish_s']}), report {config.report_s:.3g} s",
        f"  sizes    adapter {times.adapter_mb:.4g} MB ({source['adapter_mb']}), group {times.group_mb:.3g} MB "
        f"({source['group_mb']}); links of {config.link_mb_s:g} MB/s, {config.actors_per_node} actors a node",
        f"  control  {config.controller_groups_per_s:g} groups/s at most",
        f"  bound    rollout.max_staleness={rollout.max_staleness}",
    ]
    if config.mean_time_between_failures_s is not None:
        lines.append(
            f"  faults   an actor fails every {config.mean_time_between_failures_s:g} s and is replaced in "
            f"{config.replace_s:g} s; {config.hangs:.0%} of failures are hangs, found after {config.timeouts.lease:g} s"
        )
    if config.slow:
        lines.append(f"  slow     {config.slow:.0%} of the actors take {config.slow_by:g} times as long")
    return lines
