"""Values that replace those of a job file: `KEY=VALUE` of the command line, and settings of callers."""

from contextlib import suppress
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from orchestrator.errors import UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.yaml import NULLS, YamlDocument, dotted, read_document, shown
from orchestrator.spec.keys.section import Path, Section


@dataclass(frozen=True)
class Setting:
    """A value that replaces the job's own at `key`.

    Args:
        said: source of the value, which errors name instead of the file.
        unless: keys; if the job sets one of them, this setting is ignored.
    """

    key: Path
    value: Any
    said: str
    unless: tuple[Path, ...] = ()


def apply(document: YamlDocument, override: str | Setting) -> None:
    """Set a key of the document. A mistake in the value, or above the key, becomes one of its problems.

    Args:
        override: a setting, or `KEY=VALUE`: a dotted key, and YAML, or plain text where the key's value is text.

    Raises:
        UsageError: the text is no `KEY=VALUE`.
    """
    setting = override if isinstance(override, Setting) else _parsed(document, override)
    if any(document.says(key) for key in setting.unless):
        return
    wrong = _expand(document, setting.key)
    if wrong is None:
        document.put(setting.key, setting.value, setting.said)
        return
    path, value = wrong
    rule = f"must be a mapping, since {setting.said} sets a key in it; got {shown(value)}"
    document.problems.append(document.problem(path, f"{rule}; write it as one, or set {dotted(path)} as a whole"))
    document.refused.add(path)


def _parsed(document: YamlDocument, override: str) -> Setting:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise UsageError(
            f"--set {override} sets nothing; it must be KEY=VALUE with a dotted key, like train.max_steps=200",
            unchanged="Nothing was started.",
        )
    source = f"--set {override}"
    if _is_literal(path, text.strip()):
        return Setting(path, text.strip(), source)
    value = read_document(text, source)
    document.problems += value.problems
    return Setting(path, value.value, source)


def _is_literal(path: Path, text: str) -> bool:
    """Whether `text` is the value itself, not YAML: only text is possible at `path`, and `text` isn't in quotes.

    Null and an empty value are YAML's null, which some keys may be, but no value in a mapping to text, such as `envs`.
    """
    kind: Any = JobSpec
    is_in_mapping = False
    for part in path:
        is_in_mapping = get_origin(kind) is dict
        field = _field(kind, part)
        kind = get_args(kind)[1] if is_in_mapping else None if field is None else _without_null(field.annotation)
    is_plain = text.isprintable() and not text.startswith(("'", '"'))
    return kind is str and is_plain and (is_in_mapping or text not in NULLS)


def _expand(document: YamlDocument, path: Path) -> tuple[Path, Any] | None:
    """Replace the short forms above `path`, such as `workers: 2`, by the mappings that they stand for.

    Returns:
        the path and value of what stands above `path` and can hold no key; None if nothing does.
    """
    section: dict[str | int, Any] = document.value
    kind: Any = JobSpec
    for depth, part in enumerate(path[:-1], 1):
        field = _field(kind, part)
        kind = None if field is None else _without_null(field.annotation)
        if section.get(part) is None:
            return None
        if field is not None and not isinstance(section[part], dict):
            with suppress(ValidationError):
                section[part] = _mapping_of(section[part], field)
        if not isinstance(section[part], dict):
            return path[:depth], section[part]
        section = section[part]
    return None


def _mapping_of(value: Any, field: FieldInfo) -> Any:
    """What the field's own validators, which run before pydantic's, make of a short form."""
    for validator in field.metadata:
        if isinstance(validator, BeforeValidator):
            value = TypeAdapter(Annotated[Any, validator]).validate_python(value)
    return value


def _field(kind: Any, key: str | int) -> FieldInfo | None:
    """The field of a section that is called `key`; None if there is none, or `kind` is no section."""
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}
    return next((field for name, field in fields.items() if key == (field.alias or name)), None)


def _without_null(kind: Any) -> Any:
    """A type without its constraints, and without null if it is one type or null."""
    if get_origin(kind) is Annotated:
        return _without_null(get_args(kind)[0])
    others = [other for other in get_args(kind) if other is not NoneType]
    return _without_null(others[0]) if len(others) == 1 and NoneType in get_args(kind) else kind
