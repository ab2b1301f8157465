"""Frozen dataclasses to plain JSON values and back, by their type hints.

What the journal and `status.json` hold is written and read by this one pair, so that every value of `protocol` and
`policy` can be stored without a line of its own. Reading is strict: a key that the class does not have, or a value
of another type, is an error, because a half-understood state must not be acted on.
"""

import dataclasses
import types
from enum import Enum
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from orchestrator.errors import ProtocolError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts, tuples to lists, enums to their values; what JSON knows stays as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(cls: type[T], plain: Any) -> T:
    """The dataclass `cls` whose `to_plain` is `plain`.

    Raises:
        ProtocolError: an unknown or missing key, or a value that does not fit its type hint.
    """
    return _read(cls, plain, cls.__name__)  # type: ignore[no-any-return]


def _read(hint: Any, plain: Any, where: str) -> Any:
    if hint is Any:
        return plain
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _read_optional(hint, plain, where)
    if origin is tuple:
        return _read_tuple(get_args(hint), plain, where)
    if origin is dict:
        _, item = get_args(hint)
        return {key: _read(item, value, f"{where}.{key}") for key, value in _expect(plain, dict, where).items()}
    if dataclasses.is_dataclass(hint):
        return _read_dataclass(hint, plain, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(plain)
    return _read_scalar(hint, plain, where)


def _read_dataclass(cls: Any, plain: Any, where: str) -> Any:
    names = {f.name for f in dataclasses.fields(cls)}
    unknown = set(_expect(plain, dict, where)) - names
    if unknown:
        raise ProtocolError(f"{where} has no field {', '.join(sorted(unknown))}; was it written by another version?")
    hints = get_type_hints(cls)
    try:
        return cls(**{key: _read(hints[key], value, f"{where}.{key}") for key, value in plain.items()})
    except TypeError as error:
        raise ProtocolError(f"{where} can't be read: {error}") from error


def _read_optional(hint: Any, plain: Any, where: str) -> Any:
    if plain is None:
        return None
    (only,) = (arg for arg in get_args(hint) if arg is not type(None))
    return _read(only, plain, where)


def _read_tuple(args: tuple[Any, ...], plain: Any, where: str) -> tuple[Any, ...]:
    items = _expect(plain, list, where)
    hints = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
    if len(hints) != len(items):
        raise ProtocolError(f"{where} has {len(items)} items; it needs {len(hints)}")
    return tuple(_read(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, items, strict=True)))


def _read_scalar(hint: Any, plain: Any, where: str) -> Any:
    if hint is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    return _expect(plain, hint, where)


def _expect(plain: Any, hint: Any, where: str) -> Any:
    wrong_bool = isinstance(plain, bool) and hint is not bool  # bool is an int to isinstance
    if wrong_bool or not isinstance(plain, hint):
        raise ProtocolError(f"{where} is {plain!r}; it must be {hint.__name__}")
    return plain
