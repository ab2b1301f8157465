"""Changes of values that are divided by concern (`Report`, `StepRecord`), by the names of their fields alone."""

import dataclasses
from functools import cache
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")


def changed(value: T, **changes: Any) -> T:
    """A copy with these fields changed, each in the part that has it. Raises KeyError for an unknown field."""
    cls: Any = type(value)
    places = _places(cls)
    own: dict[str, Any] = {}
    of_parts: dict[str, dict[str, Any]] = {}
    for name, new in changes.items():
        part = places[name]
        if part is None:
            own[name] = new
        else:
            of_parts.setdefault(part, {})[name] = new
    for part, inner in of_parts.items():
        own[part] = dataclasses.replace(own.get(part, getattr(value, part)), **inner)
    return dataclasses.replace(value, **own)  # type: ignore[type-var]


def read(value: Any, name: str) -> Any:
    """A field of the value, or of the part of it that has it."""
    cls: Any = type(value)
    part = _places(cls)[name]
    return getattr(value if part is None else getattr(value, part), name)


@cache
def _places(cls: Any) -> dict[str, str | None]:
    """Part that has a field, by the field's name; None for the value's own fields."""
    places: dict[str, str | None] = {}
    hints = get_type_hints(cls)
    for part in dataclasses.fields(cls):
        inner = dataclasses.fields(hints[part.name]) if dataclasses.is_dataclass(hints[part.name]) else ()
        for name, place in ((part.name, None), *((f.name, part.name) for f in inner)):
            if name in places:
                raise TypeError(f"two fields of {cls.__name__} and its parts are called {name}")
            places[name] = place
    return places
