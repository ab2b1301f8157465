"""The base of a job file's sections, and the report of rules that they break.

A rule between keys names all keys that it reads. So all mistakes of a file are reported at once, each at the line of a
key that the user wrote, without rules that only break because of another mistake.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Path = tuple[str | int, ...]
HERE = "."  # the directory in which a job is submitted


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


def refuse(rule: str) -> PydanticCustomError:
    """The error that a validator of a single value raises. `rule` begins with "must"."""
    return PydanticCustomError("broken_rule", "{rule}", {"rule": rule})


def directory(path: str) -> str:
    """Validate a path of the file system, whether or not it exists."""
    if not path.strip() or "\0" in path or "://" in path:
        raise refuse("must be a path of the file system")
    return path
