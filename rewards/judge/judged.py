"""Any task, with a judge's score as one more part of its reward."""

from typing import TYPE_CHECKING, Any, ClassVar, cast

from rewards.errors import ConfigError, DataError
from rewards.judge.settings import JudgeSettings
from rewards.task import BUILT_IN, Grade, Task, get_task, grade_timeout_problem

if TYPE_CHECKING:
    from rewards.judge.judge import Judge

PART = "judge"
"""The part of the reward."""
_DISK_S = 1.0
"""Seconds for looking a score up and keeping it."""


def load_task(name: str, judge: JudgeSettings) -> Task:
    """The task of that name (``rewards.task.get_task``), judged where the settings name a judge.

    Raises:
        ConfigError: there is no such task, it can't be judged so, or can't be graded without a judge.
    """
    task = get_task(name)
    if problems := judge.problems():
        raise ConfigError("\n".join(problems))
    if judge.model is None:
        if not task.components:
            raise ConfigError(f"only a judge can grade task {name}; set task.judge.model and task.judge.rubric")
        return task
    if PART in task.components:
        raise ConfigError(
            f"task {name} has a reward part {PART!r} of its own; rename it, or leave task.judge.model null"
        )
    if not task.components and judge.right_from is None:
        raise ConfigError(f"task {name} has no verdict of its own; set task.judge.right_from")
    about = {
        "judge_settings": judge,
        "components": (*task.components, PART),
        "largest": {**task.largest, PART: abs(judge.weight)},
        "time_limit_s": task.time_limit_s + judge.timeout_s + _DISK_S,
    }
    return cast(Task, type(f"Judged{type(task).__name__}", (_Judged, type(task)), about)())


def grading_problems(name: str, judge: JudgeSettings, grade_timeout_s: float) -> list[str]:
    """What is wrong with the settings of a task, each as one sentence. A user's own task is checked where it is
    imported, by its graders."""
    problems = judge.problems()
    if problems or name not in BUILT_IN:
        return problems
    try:
        task = load_task(name, judge)
    except ConfigError as error:
        return [str(error)]
    return [problem] if (problem := grade_timeout_problem(task, grade_timeout_s)) else []


class _Judged(Task):
    """What a judged task does otherwise than the task that it is made of."""

    judge_settings: ClassVar[JudgeSettings]
    _judge: "Judge | None" = None

    def prepare(self) -> None:
        super().prepare()
        self._made()

    def grade(self, fields: dict[str, Any], completion: str) -> Grade:
        """Also raises JudgeFailed where the judge gives no score: then there is no grade."""
        settings = self.judge_settings
        grade = super().grade(fields, completion)  # type: ignore[safe-super]  # the task's own, next in line
        if missing := [name for name in settings.fields if name not in fields]:
            raise DataError(f"the problem has no field {missing[0]} (task.judge.fields), only {', '.join(fields)}")
        shown = {name: fields[name] for name in settings.fields}
        score = self._made().score(self.messages(fields), shown, completion)
        share = (score - settings.lowest) / (settings.highest - settings.lowest)
        components = {**grade.components, PART: settings.weight * share}
        if settings.right_from is None:
            return Grade(grade.correct, components, grade.error)
        right = score >= settings.right_from
        error = None if right else f"the judge's score is {score:g}, less than {settings.right_from:g}"
        return Grade(right, components, error)

    def _made(self) -> "Judge":
        """The judge of this process; its HTTP library is imported where there is one only."""
        if self._judge is None:
            from rewards.judge.judge import Judge

            self._judge = Judge(self.judge_settings)
        return self._judge
