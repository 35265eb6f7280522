"""What the processes of a run need on one hardware, and what they have."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from learner.planning.compute import Work
from learner.planning.hardware import Hardware
from learner.planning.memory import GIB, Device, ProcessMemory, actor_memory, rank_memory
from learner.planning.one_process import one_process_memory
from learner.planning.scored import completions_learned
from learner.planning.shapes import ModelShape
from learner.settings.run import RunConfig, required_resources
from rewards.errors import ConfigError
from rewards.task import BUILT_IN, get_task


@dataclass(frozen=True)
class Budget:
    """What a process may use."""

    bytes: int | None
    says: str


class Needs:
    """What the processes of one configuration need on one hardware.

    ``given``: the budgets of a rank and of an actor, in place of the hardware's.
    """

    def __init__(
        self,
        config: RunConfig,
        model: ModelShape,
        hardware: Hardware,
        prompt: int,
        given: tuple[Budget, Budget] | None = None,
    ) -> None:
        self.config, self.model, self.hardware, self.prompt = config, model, hardware, prompt
        self.given = given
        resources = config.resources
        self.one_process = resources.one_process
        self.rank_device: Device = "cuda" if resources.gpus_per_rank > 0 else "cpu"
        self.actor_device: Device = "cuda" if resources.gpus_per_actor > 0 else "cpu"

    def rank(self, views: int | None = None, *, checkpointing: bool | None = None) -> ProcessMemory:
        if self.one_process:
            return self._both(views=views, checkpointing=checkpointing)
        where: Any = {"device": self.rank_device, "prompt": self.prompt}
        return rank_memory(self.config, self.model, views=views, checkpointing=checkpointing, **where)

    def actor(self, rows: int | None = None) -> ProcessMemory:
        if self.one_process:
            return self._both(rows=rows)
        return actor_memory(self.config, self.model, device=self.actor_device, prompt=self.prompt, rows=rows)

    def _both(self, **sizes: Any) -> ProcessMemory:
        return one_process_memory(self.config, self.model, device=self.rank_device, prompt=self.prompt, **sizes)

    def with_config(self, changes: dict[str, Any]) -> "Needs | None":
        """The same with other settings; None where they contradict the rest."""
        data = self.config.model_dump(mode="python")
        for key, value in changes.items():
            *path, last = key.split(".")
            section = data
            for name in path:
                section = section[name]
            section[last] = value
        try:
            return Needs(type(self.config).model_validate(data), self.model, self.hardware, self.prompt, self.given)
        except (ConfigError, ValueError):
            return None

    def budgets(self) -> tuple[Budget, Budget]:
        """Of a rank and of an actor."""
        if self.given is not None:
            return self.given
        config, memory = self.config, self.hardware.memory
        found = []
        of_actor = config.rollout.vllm.memory_share if config.rollout.engine == "vllm" else 1.0
        for device, gpus, part in (
            (self.rank_device, config.resources.of("rank")[1], 1.0),
            (self.actor_device, config.resources.of("actor")[1], of_actor),
        ):
            if memory is None or (device == "cuda") != (self.hardware.device == "cuda"):
                found.append(Budget(None, "memory unknown"))
            elif device == "cuda":
                share = min(1.0, gpus) * part
                says = f"{share:g} of a GPU's {memory / GIB:.1f} GiB" if share < 1 else "one GPU"
                found.append(Budget(int(memory * share), says))
            else:
                mine = "rank" if not found or self.one_process else "actor"
                count = config.learner.ranks if mine == "rank" else config.rollout.wanted_actors
                left = memory - (self.node_total() - self._own(mine))
                mapped = (self.rank() if mine == "rank" else self.actor()).mapped
                found.append(Budget(left // count + mapped, "this machine's memory less what the others need"))
        return found[0], found[1]

    def problems(self) -> Iterator[str]:
        """What doesn't fit."""
        hardware, config = self.hardware, self.config
        _, gpus = required_resources(config)
        if hardware.device == "cuda" and hardware.gpus and gpus > hardware.gpus:
            yield (
                f"{config.learner.ranks} ranks and {config.rollout.wanted_actors} actors ask for {gpus:g} GPUs, and "
                f"there are {hardware.gpus}"
            )
        if hardware.device == "cpu":
            total = self.node_total()
            if hardware.memory is not None and total > hardware.memory:
                yield f"all processes together need {gib(total)}, and there are {gib(hardware.memory)}"
            return
        for process, budget in self._budgeted():
            if budget.bytes is not None and process.peak > budget.bytes:
                yield f"a {process.name} needs {gib(process.peak)} and has {gib(budget.bytes)} ({budget.says})"

    def excess(self) -> int:
        """Bytes beyond the budgets, of all kinds of process together."""
        if self.hardware.device == "cpu":
            return max(0, self.node_total() - (self.hardware.memory or self.node_total()))
        return sum(
            max(0, process.peak - budget.bytes) for process, budget in self._budgeted() if budget.bytes is not None
        )

    def node_total(self) -> int:
        """Of all processes that work on CPUs; what they map of one file counts once."""
        on_cpus = [process.mapped for process in (self.rank(), self.actor()) if process.device == "cpu"]
        return self._own("rank") + self._own("actor") + max(on_cpus, default=0)

    def mapped(self) -> int:
        """Of the checkpoint's file, in the memory of a node."""
        return max(self.rank().mapped, self.actor().mapped)

    def node_bytes(self, work: Work) -> int:
        config = self.config
        ranks, actors = config.learner.ranks, config.rollout.wanted_actors
        beside = ranks * self.rank().host_bytes + (0 if self.one_process else actors * self.actor().host_bytes)
        own = self._own("rank") + self._own("actor") + beside
        return own + self.mapped() + work.buffered + self.sandboxed_bytes()

    def sandboxed_bytes(self) -> int:
        """0 for a user's own task: it isn't imported here."""
        name, rollout = self.config.task.name, self.config.rollout
        each = get_task(name).memory_limit_mb << 20 if name in BUILT_IN else 0
        return rollout.wanted_actors * rollout.graders_per_actor * each

    def largest_views(self) -> int | None:
        bytes_ = self.budgets()[0].bytes
        upper = completions_learned(self.config) * self.config.objective.cost(self.config.rollout.sampler.spec()).views
        return None if bytes_ is None else _largest(lambda n: self.rank(n).peak <= bytes_, upper)

    def largest_rows(self) -> int | None:
        bytes_ = self.budgets()[1].bytes
        upper = self.config.rollout.groups_per_lease * self.config.rollout.group_size
        return None if bytes_ is None else _largest(lambda n: self.actor(n).peak <= bytes_, upper)

    def _budgeted(self) -> list[tuple[ProcessMemory, Budget]]:
        """Each kind of process, and what it may use."""
        pairs = list(zip((self.rank(), self.actor()), self.budgets(), strict=True))
        return pairs[:1] if self.one_process else pairs

    def _own(self, kind: str) -> int:
        """Of all processes of a kind that work on CPUs, without what others have mapped too."""
        if kind == "rank":
            return self.config.learner.ranks * self.rank().own if self.rank_device == "cpu" else 0
        if self.one_process:
            return 0
        return self.config.rollout.wanted_actors * self.actor().own if self.actor_device == "cpu" else 0


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"


def _largest(fits: Callable[[int], bool], upper: int) -> int:
    """The largest n from 0 to ``upper`` that fits; needs grow with n."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
