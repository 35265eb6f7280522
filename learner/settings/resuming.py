"""The settings of a start: a recipe with arguments laid over it, or, for a run that goes on, its own with them laid
over."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, create_model

from learner.settings import arguments as overrides
from learner.settings.saved import OF_A_START, run_of, run_to_resume, saved_settings, starts
from learner.settings.sections import RunPlace
from rewards.errors import ConfigError
from rewards.section import Section

Model = TypeVar("Model", bound=BaseModel)


def load_start(
    argv: Sequence[str], model: type[Model], *, kind: Literal["run", "sft"], default: str | None = None
) -> Model:
    """``settings_from_arguments`` for a new run. For one that goes on, the run's own settings, over which only what an
    argument names is laid; ``run.resume`` is then a path, so that what follows means the same run.

    Raises:
        ConfigError: one sentence (one line) per problem.
    """
    recipe = overrides.recipe_in(argv, kind)
    given = overrides.laid_over(overrides.settings_of(recipe or default), argv, model)
    try:
        place = _place(given, model)
    except ConfigError:
        return overrides.validated(given, model, source="")  # it is said beside what else is wrong
    run = run_to_resume(place, kind) if place.resume == "auto" or run_of(place.resume) else None
    if run is None:  # a path that leads nowhere is refused by check_paths
        new = [*argv, "run.resume=never"] if place.resume == "auto" else argv
        return overrides.settings_from_arguments(new, model, kind=kind, default=default)
    if recipe is not None:
        _require_own_recipe(recipe, run)
    own = saved_settings(run)
    own["run"] = {key: value for key, value in own.get("run", {}).items() if key not in OF_A_START}
    settings = overrides.laid_over(own, argv, model)
    settings["run"] |= {key: given["run"][key] for key in OF_A_START if key in given["run"]}
    if place.resume == "auto":
        settings["run"]["resume"] = str(run)
    return overrides.validated(settings, model, source="")


def _place(given: dict[str, Any], model: type[BaseModel]) -> RunPlace:
    """Name and place alone: the rest of the settings may be the run's to give."""
    field: Any = model.model_fields["run"]
    only_run: Any = create_model("Place", __base__=Section, run=(field.annotation, field.default))
    return overrides.validated({"run": given["run"]} if "run" in given else {}, only_run, source="").run


def _require_own_recipe(recipe: str, run: Path) -> None:
    """Refuses a recipe that says something else than the one which the run was started with: it would not be heard."""
    before = next((row for row in starts(run) if isinstance(row.get("recipe_settings"), dict)), None)
    if before is None:
        return
    old, new = overrides.flat(before["recipe_settings"]), overrides.flat(overrides.settings_of(recipe))
    changes = [
        f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    if changes:
        shown = ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
        raise ConfigError(
            f"recipe={recipe} is not what {run} was started with ({shown}), and a run goes on with its own settings; "
            "leave the recipe out, and give what is to change as key.sub=value"
        )
