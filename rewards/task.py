"""What a task is: problems, the prompt for each, and a grader. Built-in tasks and a user's own share this interface.

A grade holds two things that are never mixed: the *verdict* (right or wrong, strict) and the *reward components*
(shaped, what training adds up). Reports of solve rates use the verdict alone.
"""

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rewards.errors import ConfigError, DataError
from rewards.infill import Infill
from rewards.layout import Layout

Split = Literal["train", "test"]

BUILT_IN = {
    "antibody_cdr": "rewards.tasks.antibody_cdr:AntibodyCdr",
    "antibody_cdrs": "rewards.tasks.antibody_cdr:AntibodyCdrs",
    "commonsense_qa": "rewards.tasks.commonsense_qa:CommonsenseQa",
    "countdown": "rewards.tasks.countdown:Countdown",
    "countdown_agrpo": "rewards.protocols.agrpo:CountdownAgrpo",
    "countdown_d1": "rewards.protocols.d1:CountdownD1",
    "countdown_in_order": "rewards.tasks.countdown:CountdownInOrder",
    "gsm8k": "rewards.tasks.gsm8k:Gsm8k",
    "gsm8k_agrpo": "rewards.protocols.agrpo:Gsm8kAgrpo",
    "gsm8k_d1": "rewards.protocols.d1:Gsm8kD1",
    "gsm8k_spg": "rewards.protocols.spg:Gsm8kSpg",
    "hellaswag": "rewards.tasks.hellaswag:HellaSwag",
    "humaneval": "rewards.tasks.humaneval:HumanEval",
    "math": "rewards.tasks.math:Math",
    "math_agrpo": "rewards.protocols.agrpo:MathAgrpo",
    "math_d1": "rewards.protocols.d1:MathD1",
    "math_spg": "rewards.protocols.spg:MathSpg",
    "mbpp": "rewards.tasks.mbpp:Mbpp",
    "open_prompts": "rewards.tasks.open_prompts:OpenPrompts",
    "reaction": "rewards.tasks.reaction:Reaction",
    "reaction_span": "rewards.tasks.reaction:ReactionSpan",
    "sudoku": "rewards.tasks.sudoku:Sudoku",
    "sudoku_agrpo": "rewards.protocols.agrpo:SudokuAgrpo",
    "sudoku_d1": "rewards.protocols.d1:SudokuD1",
    "sudoku_spg": "rewards.protocols.spg:SudokuSpg",
}


@dataclass(frozen=True)
class Problem:
    """One problem: an id unique within its source, and JSON-able fields, which are all that the grader gets to see."""

    id: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class Grade:
    """The strict verdict, the shaped reward by named component, and one sentence on why it is not right (or None)."""

    correct: bool
    components: dict[str, float]
    error: str | None = None

    @property
    def reward(self) -> float:
        return sum(self.components.values(), 0.0)


@dataclass(frozen=True)
class AnswerPair:
    """Two completions for one problem, each as the model is to write it: a right one, and one by a wrong rule."""

    right: str
    wrong: str


class Task(ABC):
    """Subclass this to add a task; ``get_task("module:Class")`` finds it. Instances hold no state."""

    name: ClassVar[str]
    components: ClassVar[tuple[str, ...]]
    """Keys of every grade's components, in this order. None: only a judge can grade it (``rewards.judge``)."""
    largest: ClassVar[Mapping[str, float]] = {}
    """The largest absolute value of components, where there is one: what a page draws a value out of."""
    time_limit_s: ClassVar[float] = 1.0
    """Seconds within which ``grade`` returns, whatever the completion."""
    memory_limit_mb: ClassVar[int] = 0
    """MiB that what a completion makes run beside the grader may hold at once; 0 when nothing is."""
    default_sources: ClassVar[Mapping[Split, str]] = {}
    """For a task of real data, where each split's problems come from when no path is given (``rewards.tasks.hub``).
    Empty when problems are generated instead."""

    def source(self, split: Split, path: str | None) -> str | None:
        """Where a split's problems are read from: ``path``, else the default source; None when they are generated."""
        return path if path is not None else self.default_sources.get(split)

    @abstractmethod
    def problems(self, split: Split, *, seed: int, size: int, path: str | None = None) -> list[Problem]:
        """Problems of a split.

        Read from ``source(split, path)``, a file or a hub data set (``rewards.tasks.hub``): its first ``size`` usable
        rows, fewer if it holds fewer. Where that is None: exactly ``size`` of them, generated from ``seed``; for one
        seed, the train and the test split share no leak key, and a larger ``size`` only appends.

        Raises ConfigError for a size that can't be had and DataError for a source that can't be used.
        """

    @abstractmethod
    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        """Chat messages (role and content) that put the problem to the model."""

    def prompt(self, fields: dict[str, Any]) -> Sequence[dict[str, str]] | Infill:
        """What the model gets: the messages, and the completion follows; or a text with gaps, which are the completion
        (``InfillTask``)."""
        return self.messages(fields)

    @abstractmethod
    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        """Grades one completion: returns for any string, within ``time_limit_s``. Raises DataError when ``fields`` make
        no problem."""

    def verdicts_by(self) -> str | None:
        """What decides verdicts on this machine, in a few words, where it may be another on the next one; else None."""
        return None

    def prepare(self) -> None:  # noqa: B027 - most tasks have nothing to prepare
        """Called once by a process before it grades: starts what the first verdict would otherwise wait for."""

    @abstractmethod
    def validate_fields(self, fields: dict[str, Any]) -> None:
        """Raises DataError, naming the field and its value, when ``fields`` don't make a problem."""

    def demonstrations(self, fields: dict[str, Any]) -> AnswerPair:
        """What the small base is taught for a problem (``learner.small_base``): a task that has none needs an existing
        model. The wrong answers follow one rule, always the same, which is right by accident at most.

        Raises ConfigError when the task has no demonstrations, DataError when this problem can't have any."""
        raise ConfigError(
            f"there are no demonstrations for task {self.name}, so no base can be built for it; set model.path to an "
            "existing model, or give the task the method demonstrations"
        )

    def expected(self, fields: dict[str, Any]) -> str | None:
        """A right answer, for people to compare with; None where none is known."""
        return None

    def layout(self, fields: dict[str, Any], completion: str, *, correct: bool) -> Layout | None:
        """How pages show an answer, with what each part of it is worth; None: as plain text. ``correct`` is the verdict
        that was given: nothing of the completion is run, or asked of anybody, again. Quick for any completion."""
        return None

    def leak_key(self, fields: dict[str, Any]) -> Hashable:
        """What train and test must not share. By default the whole problem."""
        return json.dumps(fields, sort_keys=True)

    def solvable(self, fields: dict[str, Any]) -> bool:
        """Whether a problem has a right answer at all. One that has none teaches nothing; a run leaves it out."""
        return True

    def check_disjoint(self, train: Sequence[Problem], test: Sequence[Problem]) -> None:
        """Raises DataError naming the first train problem whose leak key is also a test problem's."""
        test_ids = {self.leak_key(problem.fields): problem.id for problem in test}
        for problem in train:
            key = self.leak_key(problem.fields)
            if key in test_ids:
                raise DataError(
                    f"{self.name}: train problem {problem.id} and test problem {test_ids[key]} share {key!r}; "
                    "take that problem out of one of the two files, or choose other files"
                )

    def without_leaks(self, train: Sequence[Problem], test: Sequence[Problem]) -> list[Problem]:
        """The train problems, in order, that share no leak key with a test problem."""
        test_keys = {self.leak_key(problem.fields) for problem in test}
        return [problem for problem in train if self.leak_key(problem.fields) not in test_keys]


class InfillTask(Task):
    """A task whose prompts have gaps. Its graders see the contents of the gaps, joined by
    ``rewards.infill.SEPARATOR``: with a single gap, its text."""

    @abstractmethod
    def prompt(self, fields: dict[str, Any]) -> Infill:
        """The text with its gaps that puts the problem to the model."""

    def messages(self, fields: dict[str, Any]) -> list[dict[str, str]]:
        """What people, and a judge, read of the prompt."""
        found = self.prompt(fields)
        return [*found.messages, {"role": "user", "content": found.shown()}]

    def original(self, fields: dict[str, Any]) -> list[str] | None:
        """What stood in each gap before it was masked, to compare with; None where nobody knows. It need not be the
        only right completion, nor a right one."""
        return None


def grade_timeout_problem(task: Task, timeout_s: float) -> str | None:
    """One sentence when a grader that is killed after ``timeout_s`` seconds could be killed before its verdict."""
    if timeout_s >= task.time_limit_s:
        return None
    return (
        f"rollout.grade_timeout_s={timeout_s:g} is less than a verdict of the task {task.name} may take; "
        f"set it to {task.time_limit_s:g} or more"
    )


def get_task(name: str) -> Task:
    """The built-in task of that name, or a user's own by import path ``module:Class``. Raises ConfigError."""
    path = BUILT_IN.get(name, name)
    if ":" not in path:
        known = ", ".join(sorted(BUILT_IN))
        raise ConfigError(f"unknown task {name!r}; known tasks are {known}, or give your own as module:Class")
    module_name, _, class_name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # importing runs a user's code, which may raise anything
        raise ConfigError(
            f"task {name!r} can't be imported ({type(error).__name__}: {error}); "
            "check the spelling and that the module is on PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task {name!r} is not a subclass of rewards.task.Task; derive it from that class")
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(f"task {name!r} lacks {', '.join(missing)}; define them in the class")
    if missing := [attribute for attribute in ("name", "components") if not hasattr(found, attribute)]:
        raise ConfigError(f"task {name!r} lacks the class attributes {', '.join(missing)}; set them in the class")
    return found()
