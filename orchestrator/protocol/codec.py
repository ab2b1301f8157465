"""Conversion between frozen dataclasses and plain JSON values, by type hints.

The journal and `status-TERM.json` are written and read with this one pair of functions, so values of `protocol` and
`policy` need no serialization code of their own. Reading is strict: an unknown key or a value of another type is an
error, because a partly understood state must not be acted on.
"""

import dataclasses
import types
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from orchestrator.errors import ProtocolError

T = TypeVar("T")
SCALARS = frozenset({str, int, float, bool, type(None)})


class Compact:
    """Base of dataclasses of which journals have many: their JSON leaves out fields that have their default."""


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, enums to their values; JSON values stay unchanged."""
    if type(value) in SCALARS:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: getattr(value, name) for name in _names(type(value))}
        if isinstance(value, Compact):
            cls: Any = type(value)
            defaults = _defaults(cls)
            fields = {name: field for name, field in fields.items() if name not in defaults or field != defaults[name]}
        return {name: to_plain(field) for name, field in fields.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


@cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


@cache
def _defaults(cls: Any) -> dict[str, Any]:
    of_values = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    made = {
        f.name: f.default_factory() for f in dataclasses.fields(cls) if f.default_factory is not dataclasses.MISSING
    }
    return of_values | made


def from_plain(cls: type[T], plain: Any) -> T:
    """The dataclass `cls` whose `to_plain` is `plain`.

    Raises:
        ProtocolError: an unknown or missing key, or a value that does not fit its type hint.
    """
    try:
        return _reader(cls)(plain)  # type: ignore[no-any-return, arg-type]
    except _Unfit as unfit:
        raise ProtocolError(f"{cls.__name__}{''.join(reversed(unfit.at))} {unfit.rule}") from unfit.__cause__


class _Unfit(Exception):
    """A value doesn't match its type hint. `at` is its path, innermost part first."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.at: list[str] = []


Reader = Callable[[Any], Any]  # from a plain value


@cache
def _reader(hint: Any) -> Reader:
    """Reader of values of this type, cached, as journals have many values."""
    if hint is Any:
        return _as_it_is
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _optional_reader(hint)
    if origin is tuple:
        return _tuple_reader(get_args(hint))
    if origin is dict:
        return _dict_reader(get_args(hint)[1])
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _enum_reader(hint)
    return _scalar_reader(hint)


def _as_it_is(plain: Any) -> Any:
    return plain


def _dataclass_reader(cls: Any) -> Reader:
    hints = get_type_hints(cls)
    readers = {f.name: _reader(hints[f.name]) for f in dataclasses.fields(cls)}

    def read(plain: Any) -> Any:
        unknown = _expect(plain, dict).keys() - readers.keys()
        if unknown:
            raise _Unfit(f"has no field {', '.join(sorted(unknown))}; was it written by another version?")
        key, values = "", {}
        try:
            for key, value in plain.items():
                values[key] = readers[key](value)
        except _Unfit as unfit:
            unfit.at.append(f".{key}")
            raise
        try:
            return cls(**values)
        except TypeError as error:
            raise _Unfit(f"can't be read: {error}") from error

    return read


def _optional_reader(hint: Any) -> Reader:
    (only,) = (_reader(arg) for arg in get_args(hint) if arg is not type(None))
    return lambda plain: None if plain is None else only(plain)


def _dict_reader(hint: Any) -> Reader:
    reader = _reader(hint)
    return lambda plain: {key: _read_at(f".{key}", reader, value) for key, value in _expect(plain, dict).items()}


def _tuple_reader(hints: tuple[Any, ...]) -> Reader:
    if hints[-1] is Ellipsis:
        of_each = _reader(hints[0])
        return lambda plain: tuple([_read_at(i, of_each, item) for i, item in enumerate(_expect(plain, list))])
    readers = [_reader(hint) for hint in hints]

    def read(plain: Any) -> Any:
        items = _expect(plain, list)
        if len(items) != len(readers):
            raise _Unfit(f"has {len(items)} items; it needs {len(readers)}")
        return tuple([_read_at(i, *both) for i, both in enumerate(zip(readers, items, strict=True))])

    return read


def _read_at(place: int | str, reader: Reader, plain: Any) -> Any:
    try:
        return reader(plain)
    except _Unfit as unfit:
        unfit.at.append(f"[{place}]" if isinstance(place, int) else place)
        raise


def _enum_reader(cls: type[Enum]) -> Reader:
    def read(plain: Any) -> Enum:
        try:
            return cls(plain)
        except ValueError:
            raise _Unfit(f"is {plain!r}; it must be one of {', '.join(str(member.value) for member in cls)}") from None

    return read


def _scalar_reader(hint: Any) -> Reader:
    if hint is float:
        return lambda plain: float(plain) if type(plain) is int else _expect(plain, float)
    return lambda plain: _expect(plain, hint)


def _expect(plain: Any, hint: Any) -> Any:
    wrong_bool = isinstance(plain, bool) and hint is not bool  # bool is an int to isinstance
    if wrong_bool or not isinstance(plain, hint):
        raise _Unfit(f"is {plain!r}; it must be {hint.__name__}")
    return plain
