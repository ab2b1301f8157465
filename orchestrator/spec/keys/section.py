"""The base of a job file's sections, and the report of rules that they break.

A rule between keys names all keys that it reads. So all mistakes of a file are reported at once, each at the line of a
key that the user wrote, without rules that only break because of another mistake.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Self, TypeVar, get_args
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Path = tuple[str | int, ...]
HERE = "."  # the directory in which a job is submitted
CodeDir = Annotated[
    str,
    Field(
        min_length=1,
        description="Directory from which `entrypoint` is imported, sent with the job; relative to the current one.",
    ),
]
REFERENCE = r"file:/.+|env:[A-Za-z_][A-Za-z0-9_]*"  # to a secret


@dataclass(frozen=True)
class Broken:
    """A rule between keys that doesn't hold.

    Args:
        keys: paths of all keys that the rule reads, relative to the section; the most likely culprit first.
        rule: the rule, with the values that break it.
    """

    keys: tuple[Path, ...]
    rule: str


class Section(BaseModel):
    """A frozen mapping with fixed keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        serialize_by_alias=True,
    )

    def broken_rules(self) -> Iterator[Broken]:
        """The rules between keys that are broken. Sections with such rules override this."""
        return iter(())

    @model_validator(mode="after")
    def _refuse_broken_rules(self) -> Self:
        broken = tuple(self.broken_rules())
        if broken:
            text = "; ".join(b.rule for b in broken)
            raise PydanticCustomError("broken_rules", "{text}", {"text": text, "broken": broken})
        return self


def broken_own_code(entrypoint: str | None, options: Mapping[str, object], code_dir: str) -> Iterator[Broken]:
    """The rules between keys of a section that may name code of the user's."""
    given = {"options": bool(options), "code_dir": code_dir != HERE}
    for key in [key for key, is_given in given.items() if is_given and entrypoint is None]:
        yield Broken(((key,), ("entrypoint",)), f"{key} has a meaning with entrypoint only; remove it")


def broken_unread(
    section: Section, choice: str, chosen: Collection[str], readers: Mapping[str, Collection[str]]
) -> Iterator[Broken]:
    """The rule that a key is left out where nothing reads it.

    Args:
        choice: the key on which that depends, and what is `chosen` by it.
        readers: by key, the choices with which it is read.
    """
    for key, choices in readers.items():
        value = getattr(section, key)
        if not {*choices} & {*chosen} and value != type(section).model_fields[key].default:
            rule = f"only {' and '.join(choices)} read{'s' * (len(choices) == 1)} {key}; got {value} for "
            yield Broken(((key,), (choice,)), rule + ", ".join(sorted(chosen)))


S = TypeVar("S", bound=Section)


def with_code_dirs(section: S, place: Callable[[str], str]) -> S:
    """The section with another directory for each function of the user's that it or a section in it names.

    Args:
        place: the new directory, by the old one.
    """
    is_own = ":" in str(getattr(section, "entrypoint", None) or getattr(section, "signal", ""))
    changed: dict[str, object] = {}
    for name, value in section:
        if name == "code_dir" and is_own:
            changed[name] = place(value)
        elif isinstance(value, Section) and (new := with_code_dirs(value, place)) is not value:
            changed[name] = new
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            changed[name] = [with_code_dirs(each, place) for each in value]
    return section.model_copy(update=changed) if changed else section


def refuse(rule: str) -> PydanticCustomError:
    """The error that a validator of a single value raises. `rule` begins with "must"."""
    return PydanticCustomError("broken_rule", "{rule}", {"rule": rule})


def directory(path: str) -> str:
    """Validate a path of the file system, whether or not it exists."""
    if not path.strip() or "\0" in path or "://" in path:
        raise refuse("must be a path of the file system")
    return path


def requirement(text: str) -> str:
    """Validate a package as pip names it."""
    try:
        url = urlsplit(Requirement(text).url or "")
    except InvalidRequirement as error:
        raise refuse(f"must be a package as pip names it: {str(error).splitlines()[0]}") from error
    if url.password:
        raise refuse("must name no password, which everybody could read: set PIP_INDEX_URL in secrets")
    return text


def storage_place(place: str) -> str:
    """Validate a directory, or the URL of a bucket, whether or not it exists."""
    if "://" not in place:
        return directory(place)
    if not re.fullmatch(r"(s3|gs|az)://[^/?#\s]+(/[^/?#\s]+)*/?", place):
        raise refuse("must be a path of the file system, or s3://, gs:// or az:// with BUCKET or BUCKET/PATH")
    return place


def key_reference(reference: str | None) -> str | None:
    """Validate where a signing key is read."""
    if reference is not None and not re.fullmatch(rf"auto|{REFERENCE}", reference):
        raise refuse("must be auto, file:PATH with an absolute path, or env:NAME")
    return reference


def keys_at(root: type[Section], path: Path) -> Iterator[str]:
    """The keys of the section at `path` below `root`; positions in lists are passed over."""
    section = root
    for part in path:
        if isinstance(part, str):
            section = next(inner for name, inner in _fields(section) if name == part and inner is not None)
    return (name for name, _ in _fields(section))


def all_keys(section: type[Section], above: Path = ()) -> Iterator[Path]:
    """The paths of all keys of a section and the sections in it."""
    for name, inner in _fields(section):
        yield (*above, name)
        if inner is not None:
            yield from all_keys(inner, (*above, name))


def _fields(section: type[Section]) -> Iterator[tuple[str, type[Section] | None]]:
    """Keys of a section; with the inner section for keys that hold one, or a list of them."""
    for name, info in section.model_fields.items():
        candidates = (info.annotation, *get_args(info.annotation))
        inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        yield info.alias or name, inner
