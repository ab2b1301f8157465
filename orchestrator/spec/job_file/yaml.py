"""A strict subset of YAML as plain values, with the line and column of every key.

Ambiguous constructs are refused: duplicate keys, anchors and aliases, tags, several documents, and the words that YAML
1.1 reads as booleans (yes, no, on, off). Numbers are those of YAML 1.2, so `3.0e-3` and `1e-3` both work.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from orchestrator.errors import Problem, SpecError
from orchestrator.spec.keys.section import Path

MAX_DEPTH = 32

NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_TRAPS = frozenset({"yes", "no", "on", "off"})
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")


@dataclass
class YamlDocument:
    """A parsed file: its value, made of dict, list, str, int, float, bool and None, and the position of each key."""

    file: str
    value: Any = None
    places: dict[Path, tuple[int, int]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    refused: set[Path] = field(default_factory=set)  # keys whose values must not be read any further
    overrides: dict[Path, str] = field(default_factory=dict)  # keys set from outside, with their source

    def written(self, path: Path) -> Path:
        """`path`, or the nearest path above it that is in the file; () for the whole file."""
        while path and path not in self.places:
            path = path[:-1]
        return path

    def problem(self, path: Path, message: str) -> Problem:
        """A problem with the key at `path`, at the position of the key, or of the section that should hold it."""
        written = self.written(path)
        line, column = self.places.get(written, (1, 1))
        return Problem(self.overrides.get(written, self.file), line, column, dotted(path), message)

    def says(self, path: Path) -> bool:
        """Whether there is a value at `path` that isn't null or empty."""
        value = self.value
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value not in (None, [], {})

    def put(self, path: Path, value: Any, source: str) -> None:
        """Set the key at `path`, overriding the file; errors name `source` instead of the file."""
        section = self.value
        for depth, part in enumerate(path[:-1], 1):
            if not isinstance(section.get(part), dict):
                section[part] = {}
                self._place(path[:depth], source)
            section = section[part]
        section[path[-1]] = value
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
        self._place(path, source)

    def _place(self, path: Path, source: str) -> None:
        self.places[path], self.overrides[path] = (1, 1), source


def read_document(text: str, file: str) -> YamlDocument:
    """Parse `text`. Refused constructs that leave a readable document are listed in its `problems`.

    Raises:
        SpecError: the text is not YAML, holds several documents, or nests deeper than MAX_DEPTH.
    """
    reader = _Reader(file)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            reader.feed(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise SpecError((Problem(file, line, column, "", f"must be YAML; {what}"),)) from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"must be printable text; found the character U+{ord(text[error.position]):04X}"
        raise SpecError((Problem(file, line, column, "", message),)) from None
    return reader.document


@dataclass
class _Open:
    """A mapping or list that is still open. In a mapping, `key` is the one whose value comes next."""

    path: Path
    value: dict[str, Any] | list[Any]
    key: str | None = None


class _Reader:
    """Builds a Document from YAML's events, without recursion."""

    def __init__(self, file: str) -> None:
        self.document = YamlDocument(file)
        self._open: list[_Open] = []
        self._documents = 0

    def feed(self, event: Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._stop(event, "must be one document; a second one begins here")
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            self._open.pop()
        elif isinstance(event, NodeEvent):
            self._node(event)

    def _node(self, event: NodeEvent) -> None:
        parent = self._open[-1] if self._open else None
        if parent is not None and isinstance(parent.value, dict) and parent.key is None:
            self._key(parent, event)
            return
        path = self._path(parent)
        self.document.places.setdefault(path, _place(event))
        self._refuse_indirection(event, path)
        value = self._value(event, path)
        if parent is None:
            self.document.value = value
        elif isinstance(parent.value, list):
            parent.value.append(value)
        else:
            assert parent.key is not None
            parent.value[parent.key] = value
            parent.key = None

    def _path(self, parent: _Open | None) -> Path:
        if parent is None:
            return ()
        if isinstance(parent.value, list):
            return (*parent.path, len(parent.value))
        assert parent.key is not None
        return (*parent.path, parent.key)

    def _key(self, parent: _Open, event: NodeEvent) -> None:
        if not isinstance(event, ScalarEvent):
            self._stop(event, "a key must be plain text")
        path = (*parent.path, event.value)
        if event.value in parent.value:
            first_line, _ = self.document.places[path]
            self._note(event, path, f"a key must stand once; this one stands on line {first_line} already")
        self.document.places[path] = _place(event)  # of a duplicate key, the last value is read
        self._refuse_indirection(event, path)
        parent.key = event.value

    def _value(self, event: NodeEvent, path: Path) -> Any:
        if isinstance(event, MappingStartEvent | SequenceStartEvent):
            if len(self._open) == MAX_DEPTH:
                self._stop(event, f"must not nest deeper than {MAX_DEPTH} levels")
            value: dict[str, Any] | list[Any] = {} if isinstance(event, MappingStartEvent) else []
            self._open.append(_Open(path, value))
            return value
        if not isinstance(event, ScalarEvent):
            return None  # an alias; refused already
        if event.style is not None:
            return event.value
        if event.value.lower() in _TRAPS:
            rule = "some YAML readers take this word for a boolean: write true or false, or quote it"
            self._refuse(event, path, f"{rule}; got {event.value}")
        return _plain(event.value)

    def _refuse_indirection(self, event: NodeEvent, path: Path) -> None:
        if isinstance(event, AliasEvent):
            self._refuse(event, path, f"aliases are not allowed: write the value out; got *{event.anchor}")
        elif event.anchor is not None:
            self._refuse(event, path, f"anchors are not allowed: write the value out; got &{event.anchor}")
        tag = getattr(event, "tag", None)  # aliases have none
        if tag is not None:
            self._refuse(event, path, f"tags are not allowed: remove it; got {tag}")

    def _refuse(self, event: Event, path: Path, message: str) -> None:
        self._note(event, path, message)
        self.document.refused.add(path)

    def _note(self, event: Event, path: Path, message: str) -> None:
        line, column = _place(event)
        self.document.problems.append(Problem(self.document.file, line, column, dotted(path), message))

    def _stop(self, event: Event, message: str) -> NoReturn:
        self._note(event, (), message)
        raise SpecError(tuple(self.document.problems))


def dotted(path: Path) -> str:
    """`path` as users write it: train.optimizer.betas.0"""
    return ".".join(str(part) for part in path)


def shown(value: Any) -> str:
    """A value as written in a file, shortened to one line."""
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(event: Event) -> tuple[int, int]:
    mark = event.start_mark
    assert mark is not None  # only events made by hand have none
    return mark.line + 1, mark.column + 1


def _plain(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
