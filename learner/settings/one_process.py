"""What a run needs whose ranks and actors are one process each (``resources.one_process``)."""

from learner.settings.sections import LearnerSection, ResourcesSection, RolloutSection


def one_process_problems(resources: ResourcesSection, rollout: RolloutSection, learner: LearnerSection) -> list[str]:
    """Contradictions, one sentence each."""
    if not resources.one_process:
        return []
    problems, key = [], "resources.one_process=true"
    if rollout.actors != learner.ranks:
        problems.append(
            f"{key} makes each learner rank an actor too, and rollout.actors ({rollout.actors}) isn't learner.ranks="
            f"{learner.ranks}; set them to one number"
        )
    if rollout.second_lease_after_s is not None:
        problems.append(
            f"{key} has no use for rollout.second_lease_after_s={rollout.second_lease_after_s:g}: a straggler can't "
            "learn before it has drawn; leave that null"
        )
    if rollout.max_staleness > 0:
        problems.append(
            f"{key} can't draw and learn at the same time, as rollout.max_staleness={rollout.max_staleness} asks for; "
            "set that to 0"
        )
    if rollout.engine != "torch":
        problems.append(f"rollout.engine={rollout.engine} has a base of its own, which {key} can't share; take torch")
    if learner.zero_stage == 3:
        problems.append(
            "learner.zero_stage=3 cuts the base into shards, and rollout needs it whole; take stage 2 or lower, or "
            "resources.one_process=false"
        )
    if (resources.gpus_per_rank > 0) != (resources.gpus_per_actor > 0):
        problems.append(
            f"{key} has one base, and resources.gpus_per_rank={resources.gpus_per_rank:g} and "
            f"resources.gpus_per_actor={resources.gpus_per_actor:g} put it on different devices; give both a share"
        )
    gpus = resources.of("rank")[1]
    asks = f"{key} asks for the sum of resources.gpus_per_rank and resources.gpus_per_actor, {gpus:g}"
    if gpus > 1:
        problems.append(f"{asks}, and a process computes on one GPU; make it 1 or less")
    elif learner.ranks > 1 and 0 < gpus <= 0.5:
        problems.append(
            f"{asks}, which lets two of learner.ranks={learner.ranks} share a GPU, and NCCL refuses that; "
            "take more than 0.5"
        )
    return problems
