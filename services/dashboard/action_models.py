"""What the control routes take and answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.dashboard.models import Model
from services.store import actions

Override = Annotated[str, Field(min_length=3, max_length=2000)]


class Given(BaseModel):
    """A request's body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ActionRequest(Given):
    """What a run is asked to do."""

    action: Literal["stop", "pause", "resume", "checkpoint", "set_actors"]
    actors: Annotated[int, Field(ge=1, le=4096)] | None = None
    """For set_actors: how many rollout actors the run shall have."""

    @model_validator(mode="after")
    def _actors_where_they_belong(self) -> "ActionRequest":
        if (self.action == "set_actors") != (self.actors is not None):
            raise ValueError("actors belongs to set_actors, and to nothing else")
        return self

    def arguments(self) -> dict[str, Any]:
        return {} if self.actors is None else {"actors": self.actors}


class Action(Model):
    """What a run was asked to do, and what became of it."""

    id: int
    run_id: str | None
    action: str
    arguments: dict[str, Any]
    requested_by: str
    time: float
    """When it was asked for."""
    status: Literal["requested", "accepted", "done", "refused", "expired"]
    """requested: the run has not taken it yet; accepted: the run has it; done, refused: the run's own word; expired:
    nobody took it in time, or the run ended before it confirmed."""
    result: str | None
    """What happened, or why not."""
    decided: float | None
    """When the status last changed."""
    expires: float | None
    """When a requested action expires unless the run takes it."""

    @classmethod
    def of(cls, action: actions.Action) -> "Action":
        expires = action.time + actions.LIFETIME_S if action.status == "requested" else None
        return cls(**vars(action), expires=expires)


Tag = Annotated[str, Field(min_length=1, max_length=50, pattern=r"^[^\s,]+$")]


class AnnotationRequest(Given):
    """What is written about a run; what is left out stays."""

    tags: Annotated[list[Tag], Field(max_length=20)] = []
    """Words without blanks and commas."""
    note: Annotated[str, Field(max_length=4000)] = ""
    archived: bool = False
    """Left out of lists unless asked for."""
    acknowledged: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    """Id of the last event whose warnings and errors somebody has taken note of."""


class Annotation(Model):
    """What is written about a run."""

    run_id: str
    tags: list[str] = []
    note: str = ""
    archived: bool = False
    acknowledged: int = 0


class Recipe(Model):
    """A recipe that ships."""

    name: str
    summary: str
    text: str
    """The file."""


class RecipeList(Model):
    """All recipes."""

    items: list[Recipe]
    submission: bool
    """Whether this dashboard submits runs: it was started with --ray-address."""
    ray_address: str | None
    """Ray's dashboard that jobs are sent to."""


class Setting(Model):
    """A setting of a run."""

    key: str
    about: str
    """What it means, and its unit."""
    type: str
    """number, whole number, text, yes or no, choice, or list."""
    choices: list[Any] | None = None
    """Of a choice."""
    value: Any = None
    """In the recipe, or else the default."""
    default: Any = None
    """Without a recipe."""
    belongs_to: list[str] = []
    """Choices that it is a setting of, each as key=value; empty: of all."""


class SettingList(Model):
    """Every setting of a run, in the order of the learner's help."""

    recipe: str
    items: list[Setting]


class SubmissionRequest(Given):
    """A run to be started."""

    recipe: Annotated[str, Field(min_length=1, max_length=100)]
    overrides: Annotated[list[Override], Field(max_length=100)] = []
    """Settings over the recipe's, each ``key.sub=value``. run.dir is the dashboard's folder of runs."""
    dry: bool = False
    """Only check the settings."""


class Submission(Model):
    """A submitted run."""

    id: int | None = None
    status: Literal["checked", "requested", "accepted", "done", "refused", "expired"]
    """checked: the settings are sound, nothing was started; accepted: Ray has the job; done: the run is there; refused:
    Ray would not, or the job ended before there was a run."""
    result: str | None = None
    recipe: str = ""
    overrides: list[str] = []
    run_id: str
    """The run's name, under which it will be in the list of runs."""
    job_id: str | None = None
    """Ray's name of the job."""
    requested_by: str = ""
    time: float | None = None
    job_status: str | None = None
    """pending, running, stopped, succeeded, failed, or unknown; only where one submission is asked for."""
    job_message: str | None = None
    log: str | None = None
    """The end of the job's log."""
    config: dict[str, Any] | None = None
    """The resolved settings, in the answer to a submission or a check."""

    @classmethod
    def of(cls, action: actions.Action) -> "Submission":
        given = action.arguments
        return cls(
            id=action.id,
            status=action.status,  # type: ignore[arg-type]
            result=action.result,
            recipe=given.get("recipe", ""),
            overrides=given.get("overrides", []),
            run_id=given.get("run_id", ""),
            job_id=given.get("job_id"),
            requested_by=action.requested_by,
            time=action.time,
        )
