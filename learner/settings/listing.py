"""Every setting of a run as JSON, for forms: ``python -m learner.settings.listing [recipe=NAME]``."""

import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from learner.settings import arguments as overrides
from learner.settings.run import load_config
from rewards.command import reported
from rewards.section import Section
from rollout.process import prepare_process

_KINDS = ((bool, "yes or no"), (int, "whole number"), (float, "number"), (str, "text"))


def listing(config: Section) -> list[dict[str, Any]]:
    """Each setting once, in the order of ``--help``: its ``key``, what it is ``about`` (which names the unit), its
    ``type``, ``choices`` where it is one of some, ``default``, ``value`` (that of ``config``, or else the default), and
    ``belongs_to``: the variants that have it, each as key=value; none: all."""
    values = overrides.flat(config.model_dump(mode="json"))
    found: dict[str, dict[str, Any]] = {}
    for key, field, about, variant in _settings(type(config), ""):
        if key in found:
            found[key]["belongs_to"] += [variant] if variant else []
            continue
        default = json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))
        found[key] = {
            "key": key,
            "about": " ".join((field.description or "").split()),
            **about,
            "default": default,
            "value": values.get(key, default),
            "belongs_to": [variant] if variant else [],
        }
    return list(found.values())


def _settings(
    model: type[BaseModel], prefix: str, variant: str = ""
) -> Iterator[tuple[str, FieldInfo, dict[str, Any], str]]:
    """Key, field, type, and the variant that has it."""
    for name, field in model.model_fields.items():
        sections, picks = overrides.section_models(field), field.discriminator
        if not sections:
            yield prefix + name, field, _kind(field.annotation), variant
        if isinstance(picks, str):
            choices = [overrides.variant_name(section, field) for section in sections]
            about = {"type": "choice", "choices": choices}
            yield f"{prefix}{name}.{picks}", sections[0].model_fields[picks], about, variant
        for section in sections:
            chosen = variant
            if isinstance(picks, str):
                chosen = f"{prefix}{name}.{picks}={overrides.variant_name(section, field)}"
            for inner in _settings(section, f"{prefix}{name}.", chosen):
                if inner[0] != f"{prefix}{name}.{picks}":
                    yield inner


def _kind(annotation: Any) -> dict[str, Any]:
    """Its type in words; of a union the first that has one."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _kind(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is typing.Literal:
        return {"type": "choice", "choices": list(typing.get_args(annotation))}
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [each for each in typing.get_args(annotation) if each is not type(None)]
        return _kind(members[0]) | ({"choices": None} if len(members) > 1 else {})
    for kind, name in _KINDS:
        if isinstance(annotation, type) and issubclass(annotation, kind):
            return {"type": name, "choices": None}
    return {"type": "list", "choices": None}


def main(load: Callable[[Sequence[str]], Section]) -> int:
    """``load``: makes the settings of a command's arguments, as that command does. Exit status as of every command: 0,
    or 2 for wrong settings."""

    def say() -> int:
        print(json.dumps(listing(load(sys.argv[1:]))))
        return 0

    return reported(say)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main(load_config))
