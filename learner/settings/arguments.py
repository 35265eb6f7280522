"""From recipe files and ``key.sub=value`` arguments to one nested mapping, and from pydantic's errors to sentences.

This module knows nothing of the run's settings: the model class that describes them is an argument
(``learner.settings.run`` supplies it).
"""

import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from learner.settings.nearest import nearest_key
from rewards.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def recipe_names(kind: Literal["run", "sft"] = "run") -> list[str]:
    """Names of the recipes of this kind that are shipped, sorted: those for ``learner.sft`` begin with ``sft_``, all
    others are runs of ``learner.main``."""
    files = (entry.name for entry in _shipped_recipes().iterdir())
    names = sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))
    return [name for name in names if name.startswith("sft_") == (kind == "sft")]


def recipe_summary(name: str) -> str:
    """First comment line of a shipped recipe."""
    first_line = _recipe_file(name).read_text(encoding="utf-8").partition("\n")[0]
    return first_line.removeprefix("#").strip()


def read_recipe(name_or_path: str) -> dict[str, Any]:
    """Settings of a recipe, laid over those of the recipes that it ``extends``.

    ``name_or_path`` is the name of a shipped recipe or the path of a ``.yaml`` file; ``extends`` takes either too, a
    relative path counting from the file that names it. Raises ConfigError.
    """
    return _read_chain(_recipe_file(name_or_path), seen=())


def settings_from_arguments(
    argv: Sequence[str], model: type[Model], *, kind: Literal["run", "sft"], default: str | None = None
) -> Model:
    """The settings that ``recipe=NAME_OR_PATH`` and ``key.sub=value`` arguments give; ``resume=`` is short for
    ``run.resume=``. ``default`` is the recipe when none is named.

    Raises ConfigError with one sentence (one line) per problem.
    """
    recipe = recipe_in(argv, kind) or default
    return validated(laid_over(settings_of(recipe), argv, model), model, source="")


def recipe_in(argv: Sequence[str], kind: Literal["run", "sft"]) -> str | None:
    """The recipe that the arguments name. Raises ConfigError when they name several, or one for the other command."""
    recipes = [argument.removeprefix("recipe=") for argument in argv if argument.startswith("recipe=")]
    if len(recipes) > 1:
        raise ConfigError(f"recipe is given {len(recipes)} times ({', '.join(recipes)}); give one")
    recipe = recipes[0] if recipes else None
    if recipe in recipe_names("run" if kind == "sft" else "sft"):
        right, wrong = ("main", "sft") if kind == "sft" else ("sft", "main")
        raise ConfigError(f"recipe {recipe} is one for python -m learner.{right}, not for learner.{wrong}")
    return recipe


def settings_of(recipe: str | None) -> dict[str, Any]:
    """Of a recipe by its name or path; none without one. Raises ConfigError."""
    return read_recipe(recipe) if recipe else {}


def laid_over(settings: dict[str, Any], argv: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """``settings`` with the ``key.sub=value`` arguments laid over them. Raises ConfigError."""
    # The choice of a variant comes first, since it drops what the settings say of another one.
    for argument in sorted(argv, key=_rank):
        if not argument.startswith("recipe="):
            apply_override(settings, "run." + argument if argument.startswith("resume=") else argument, model)
    return settings


def _rank(argument: str) -> tuple[bool, int]:
    """Choices of variants first, outer ones before those inside them."""
    key = argument.partition("=")[0].strip()
    return not key.endswith(".type"), key.count(".") if key.endswith(".type") else 0


def help_text(model: type[BaseModel], kind: Literal["run", "sft"]) -> str:
    """The recipes of this kind, and every key with its meaning, unit and default."""
    lines = ["recipes (recipe=NAME, or the path of a .yaml file):"]
    lines += [f"  {name:<22}{recipe_summary(name)}" for name in recipe_names(kind)]
    lines += ["", "keys (key.sub=value; what is shown is the default before the recipe):"]
    lines += _help_lines(model, "")
    return "\n".join(lines) + "\n"


def _help_lines(model: type[BaseModel], prefix: str) -> list[str]:
    """A heading for each variant of a section that has some."""
    lines = []
    for name, field in model.model_fields.items():
        key, sections = prefix + name, section_models(field)
        if not sections:
            lines.append(f"  {key + '=' + json.dumps(field.get_default()):<44}{field.description}")
        for section in sections:
            if field.discriminator:
                about = (section.__doc__ or "").partition("\n")[0]
                lines.append(f"  with {key}.{field.discriminator}={variant_name(section, field)}: {about}")
            lines += _help_lines(section, f"{key}.")
    return lines


def apply_override(data: dict[str, Any], argument: str, model: type[BaseModel]) -> None:
    """Sets one ``key.sub=value`` argument in ``data``; the value is YAML, but a text field takes it as it stands."""
    key, equals, raw = argument.partition("=")
    if not equals or not key.strip():
        if argument in (*recipe_names(), *recipe_names("sft")) or argument.endswith((".yaml", ".yml")):
            raise ConfigError(f"argument '{argument}' is a recipe: write recipe={argument}")
        raise ConfigError(f"argument '{argument}' is not of the form key.sub=value (see --help for the keys)")
    key = key.strip()
    field = _fields_by_key(model).get(key)
    if field is not None and _is_text(field):
        value = None if raw in ("", "null") else raw  # run.name=007 is a name, not a number
    else:
        value = _parse_yaml(raw, source=f"the value of {key}")
    *sections, last = key.split(".")
    target = data
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(unknown_key(key, model))
    if _of_another_variant(target, {last: value}):
        target.clear()
    target[last] = _merged(target[last], value) if isinstance(target.get(last), dict) else value


def validated(data: Mapping[str, Any], model: type[Model], source: str) -> Model:
    """``data`` as a ``model``. Raises ConfigError, one sentence per problem; ``source`` says where ``data`` is from."""
    if isinstance(data, Mapping):  # else it is refused below
        data = _with_variants_named(data, model)
    # Through JSON because pydantic's strict mode then takes lists for tuples, and still refuses "3" or True for 3.
    text = json.dumps(data, default=repr)
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        # A section in the place of a plain value was meant as a section, where there may be either.
        meant = [each for each in error.errors() if not (isinstance(each["input"], dict) and _is_plain(each["loc"]))]
        problems = _joined([_sentence(detail, model) for detail in meant or error.errors()])
    raise ConfigError("\n".join(f"{source}: {problem}" if source else problem for problem in problems))


def _with_variants_named(data: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """``data`` in which a section with variants that doesn't say which one is of the default's."""
    named = dict(data)
    for name, field in model.model_fields.items():
        sections, given = section_models(field), named.get(name)
        if not isinstance(given, Mapping):
            continue
        if isinstance(field.discriminator, str):
            one = {field.discriminator: getattr(field.get_default(), field.discriminator)} | dict(given)
            chosen = [s for s in sections if variant_name(s, field) == one[field.discriminator]]
            named[name] = _with_variants_named(one, chosen[0]) if chosen else one
        elif sections:
            named[name] = _with_variants_named(given, sections[0])
    return named


def leaf_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as (dotted key, field), in the order of the models; those of all variants where there are some, so
    that a key which several share comes several times."""
    for name, field in model.model_fields.items():
        sections = section_models(field)
        if not sections:
            yield prefix + name, field
        for section in sections:
            yield from leaf_fields(section, f"{prefix}{name}.")


@functools.cache  # a comparison asks thousands of times
def _fields_by_key(model: type[BaseModel]) -> Mapping[str, FieldInfo]:
    return dict(leaf_fields(model))


def section_models(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The models of a field that is a section of further settings: several where it has variants, of which the
    setting named by ``field.discriminator`` picks one; none for a plain setting."""
    members = typing.get_args(field.annotation) if field.discriminator else (field.annotation,)
    found = tuple(each for each in members if isinstance(each, type) and issubclass(each, BaseModel))
    assert len(found) in (0, len(members)), "a section whose variants aren't all models"
    return found


def variant_name(section: type[BaseModel], field: FieldInfo) -> str:
    """What the discriminator is set to for this variant."""
    assert isinstance(field.discriminator, str)
    return str(section.model_fields[field.discriminator].default)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def unknown_key(key: str, model: type[BaseModel]) -> str:
    """The sentence for a key that does not exist, with the nearest one that does."""
    nearest = nearest_key(key, list(leaf_fields(model)))
    remedy = f"did you mean '{nearest}'?" if nearest else "see --help for the keys"
    return f"unknown key '{key}'; {remedy}"


# ---- recipes


def _shipped_recipes() -> Traversable:
    return resources.files("learner") / "recipes"


def _recipe_file(name_or_path: str, base: Path | None = None) -> Traversable:
    if name_or_path.lower().endswith((".yaml", ".yml")):
        path = (base or Path()) / Path(name_or_path).expanduser()
        if not path.is_file():
            raise ConfigError(f"there is no recipe file '{path}'")
        return path
    if name_or_path not in (known := [*recipe_names(), *recipe_names("sft")]):
        names = ", ".join(known)
        raise ConfigError(f"there is no recipe '{name_or_path}'; shipped are {names}, or give the path of a .yaml file")
    return _shipped_recipes() / f"{name_or_path}.yaml"


def _read_chain(file: Traversable, seen: tuple[str, ...]) -> dict[str, Any]:
    if str(file) in seen:
        raise ConfigError(f"recipe '{file}' extends itself: " + " -> ".join((*seen, str(file))))
    data = _parse_yaml(file.read_text(encoding="utf-8"), source=f"recipe '{file}'")
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"recipe '{file}' must be a mapping of settings, not {_shown(data)}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise ConfigError(f"recipe '{file}' extends {_shown(parent)}, which is not the name or path of a recipe")
    base = file.parent if isinstance(file, Path) else None
    return _merged(_read_chain(_recipe_file(parent, base), (*seen, str(file))), data)


def _merged(lower: Any, upper: Any) -> Any:
    if not (isinstance(lower, dict) and isinstance(upper, dict)) or _of_another_variant(lower, upper):
        return upper
    return lower | {key: _merged(lower.get(key), value) for key, value in upper.items()}


def _of_another_variant(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> bool:
    """Whether both name their variant and not the same one: what was set for the one isn't meant for the other."""
    return "type" in lower and "type" in upper and lower["type"] != upper["type"]


_NUMBERS = {
    "int": r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$",
    "float": r"^[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf)$|^\.nan$",
}
_OWN = (*_NUMBERS, "timestamp")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2 (1e-3 is one; 010, an octal, and 10:00, a sexagesimal, are texts) and
    without dates; a key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _OWN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str) or keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+.0123456789"))


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None


# ---- sentences

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list such as [1, 2]",
    "too_short": "a list of at least {min_length} entries",
    "too_long": "a list of at most {max_length} entries",
    "model_type": "a section of settings",
    "dict_type": "a section of settings",
    "literal_error": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
}

_PLAIN_MEMBER = re.compile(r"(?:constrained-)?(?:float|int|str)")
_UNION_MEMBER = re.compile(_PLAIN_MEMBER.pattern + r"|(?:list|tuple)\[.*\]|[A-Z]\w*")
"""What pydantic puts into a place to tell which type of several it tried."""


def _is_plain(location: Sequence[int | str]) -> bool:
    return _PLAIN_MEMBER.fullmatch(str(location[-1])) is not None if location else False


def _sentence(detail: Any, model: type[BaseModel]) -> str:
    key, variant = _key_of(detail["loc"], model)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(key, model) if variant is None else _unknown_in_variant(key, variant, model)
    if kind == "union_tag_invalid":
        name = context["discriminator"].strip("'")
        return f"{key}.{name}={_shown(context['tag'])} must be {context['expected_tags'].replace(', ', ' or ')}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "value_error":  # our own cross-field checks are sentences already
        return str(context["error"])
    if kind in _WANTED:
        return f"{key}={_shown(detail['input'])} must be {_WANTED[kind].format(**context)}"
    return f"{key}={_shown(detail['input'])}: {detail['msg']}"


def _joined(sentences: Sequence[str]) -> list[str]:
    """What one value must be, of a setting that may be one thing or another, as one sentence."""
    found: dict[str, str] = {}
    for sentence in sentences:
        value, must, wanted = sentence.partition(" must be ")
        found[value] = f"{found[value]} or {wanted}" if must and value in found else sentence
    return list(found.values())


def _key_of(location: Sequence[int | str], model: type[BaseModel]) -> tuple[str, str | None]:
    """A place of pydantic's as a dotted key, without the name of the variant that it puts in; and the setting that
    picks that variant."""
    parts: list[str] = []
    variant, place = None, list(location)
    current: type[BaseModel] | None = model
    while place:
        part = place.pop(0)
        if current is None and _UNION_MEMBER.fullmatch(str(part)):
            continue
        parts.append(str(part))
        field = current.model_fields.get(str(part)) if current is not None else None
        sections = section_models(field) if field is not None else ()
        current = sections[0] if sections else None
        if field is not None and field.discriminator and place:
            name = str(place.pop(0))
            current = next(each for each in sections if variant_name(each, field) == name)
            variant = f"{'.'.join(parts)}.{field.discriminator}={name}"
    return ".".join(parts), variant


def _unknown_in_variant(key: str, variant: str, model: type[BaseModel]) -> str:
    """The sentence for a key of a section with variants: it may belong to another one."""
    if key in dict(leaf_fields(model)):
        return f"{key} is no setting of {variant}; see --help for those that are"
    return unknown_key(key, model)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(value) + "}"
    return json.dumps(value, default=repr)


def _is_text(field: FieldInfo) -> bool:
    annotation = field.annotation
    members: Sequence[Any] = (annotation,)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = typing.get_args(annotation)
    plain = (typing.get_args(each)[0] if typing.get_origin(each) is typing.Annotated else each for each in members)
    return str in plain
