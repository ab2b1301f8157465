"""Loading of job files: YAML to a `JobSpec`, or all mistakes at once with file, line, column and nearest known key."""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.errors import Problem, SpecError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.old_keys import OLD_KEYS, OLD_VALUES
from orchestrator.spec.job_file.overrides import Setting, apply
from orchestrator.spec.job_file.yaml import YamlDocument, dotted, read_document, shown
from orchestrator.spec.keys.section import Broken, Path, all_keys, keys_at

MAX_BYTES = 2**20
MAX_PROBLEMS = 100  # a file with more isn't a job file, which the first ones show


def load_job(path: str | os.PathLike[str], overrides: Sequence[str | Setting] = ()) -> JobSpec:
    """Read a job file.

    Args:
        overrides: replacements of the file's values; text is `KEY=VALUE`: a dotted key, and YAML, or plain text where
            the key's value is text.

    Raises:
        UsageError: the file can't be read, is larger than 1 MiB, or an override is no `KEY=VALUE`.
        SpecError: it has mistakes; all of them are listed, up to MAX_PROBLEMS.
    """
    file = os.fspath(path)
    try:
        with open(file, "rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(
            f"job file {file} can't be read: {error.strerror}",
            remedy="Name an existing YAML file.",
            unchanged="Nothing was started.",
        ) from None
    if len(raw) > MAX_BYTES:
        raise SpecError((Problem(file, 1, 1, "", "must be at most 1 MiB; this file is larger"),))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        message = f"must be UTF-8; found the byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise SpecError((Problem(file, line, column, "", message),)) from None
    return parse_job(text, file, overrides)


def parse_job(text: str, file: str = "<string>", overrides: Sequence[str | Setting] = ()) -> JobSpec:
    """Read a job from YAML text; `file` is only named in errors, `overrides` as in `load_job`.

    Raises:
        SpecError: the text has mistakes; all of them are listed, up to MAX_PROBLEMS.
    """
    return _job_of(read_document(text, file), overrides)


def job_from(values: Mapping[str, Any], file: str = "job", overrides: Sequence[Setting] = ()) -> JobSpec:
    """Build a job from values as in a job file, tuples and paths too; `file` is only named in errors.

    Raises:
        SpecError: the values have mistakes; all of them are listed, up to MAX_PROBLEMS.
    """
    try:
        plain = json.loads(json.dumps(values, default=os.fspath, allow_nan=False))
    except (TypeError, ValueError) as error:
        rule = f"must hold only what a job file can: mappings, lists, text, numbers, booleans, None and paths; {error}"
        raise SpecError((Problem(file, 1, 1, "", rule),)) from None
    return _job_of(YamlDocument(file, plain), overrides)


def _job_of(document: YamlDocument, overrides: Sequence[str | Setting]) -> JobSpec:
    if not isinstance(document.value, dict):
        rule = f"must be a mapping of keys, beginning with `schema: v1`; got {shown(document.value)}"
        raise SpecError((*document.problems, document.problem((), rule)))
    for override in overrides:
        apply(document, override)
    job, problems = _validated(document)
    if job is None or problems:
        in_order = sorted(set(problems), key=lambda p: (p.line, p.column, p.path, p.message))
        raise SpecError(tuple(in_order[:MAX_PROBLEMS]))
    return job


@dataclass(frozen=True)
class _Finding:
    """A mistake, and all keys that may cause it."""

    problem: Problem
    keys: tuple[Path, ...]


def _validated(document: YamlDocument) -> tuple[JobSpec | None, list[Problem]]:
    """The job if it is valid, and the problems.

    A mistake keeps pydantic from checking the rules of the section above it. So invalid keys are removed and the rest
    is validated again, until nothing more is found. Rules that read a removed key are not reported.
    """
    problems = list(document.problems)
    problems += [document.problem((key,), f"required; write `{key}: {example}`") for key, example in _missing(document)]
    values = copy.deepcopy(document.value)
    removed: set[Path] = set()
    to_remove = {_removable(key) for key in document.refused}
    while len(problems) < MAX_PROBLEMS:
        removed |= to_remove
        progress = [_take_out(values, document.written(key)) for key in to_remove]
        if to_remove and not any(progress):
            break
        values.setdefault("name", "stand-in")  # a missing or wrong name must not hide problems of the other keys
        try:
            return JobSpec.model_validate_json(json.dumps(values), strict=True), problems
        except ValidationError as error:
            errors = error.errors(include_url=False)[:MAX_PROBLEMS]
            findings = [finding for details in errors for finding in _findings(document, details)]
        problems += [f.problem for f in findings if not any(_touches(key, removed) for key in f.keys)]
        to_remove = {_removable(key) for finding in findings for key in finding.keys}
    return None, problems


def _missing(document: YamlDocument) -> Iterator[tuple[str, str]]:
    for key, example in (("schema", "v1"), ("name", "my-run")):
        if key not in document.value:
            yield key, example


def _removable(key: Path) -> Path:
    """The list that holds `key`, if any: removing a single item would shift the positions of the others."""
    ends = [i for i, part in enumerate(key) if isinstance(part, int)]
    return key[: ends[0]] if ends else key


def _take_out(values: dict[str, Any], key: Path) -> bool:
    """Remove `key` from `values`; False if it isn't there."""
    section: Any = values
    for part in key[:-1]:
        section = section.get(part) if isinstance(section, dict) else None
    if not key or not isinstance(section, dict) or key[-1] not in section:
        return False
    del section[key[-1]]
    return True


def _touches(key: Path, removed: set[Path]) -> bool:
    """Whether a removed path is `key`, or lies above or below it."""
    return any(key[: len(path)] == path[: len(key)] for path in removed)


def _findings(document: YamlDocument, details: ErrorDetails) -> Iterator[_Finding]:
    """Translate one of pydantic's errors for the author of the file."""
    path, kind = details["loc"], details["type"]
    if kind == "default_factory_not_called":  # a consequence of another error in the same section
        return
    if kind != "broken_rules":
        yield _Finding(document.problem(path, _rule(details)), (path,))
        return
    broken_rules: tuple[Broken, ...] = details["ctx"]["broken"]
    for broken in broken_rules:
        keys = tuple((*path, *key) for key in broken.keys)
        culprit = next((key for key in keys if key in document.places), document.written(keys[0]))
        yield _Finding(document.problem(culprit, broken.rule), keys)


def _rule(details: ErrorDetails) -> str:
    """The rule that a value breaks, with the value."""
    path, kind = details["loc"], details["type"]
    if kind == "extra_forbidden":
        if dotted(path) in OLD_KEYS:
            return f"unknown key; it is called {OLD_KEYS[dotted(path)]} now"
        return f"unknown key; {_nearest_keys(path)}"
    if kind == "missing":
        return "required"
    if kind == "literal_error" and (written := f"{dotted(path)}: {details['input']}") in OLD_VALUES:
        return f"{details['input']} is called {OLD_VALUES[written]} now"
    rule = re.sub(r"^(Input|String|Tuple) should ", "must ", details["msg"])
    for theirs, ours in _WORDING.items():
        rule = rule.replace(theirs, ours)
    if kind == "string_type" and isinstance(details["input"], int | float):
        rule += ", in quotes if it looks like something else"
    return f"{rule}; got {shown(details['input'])}"


_WORDING = {
    "an object": "a mapping",
    "a valid array": "a list",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    " after validation": "",
}


SURELY_MEANT = 0.9  # similarity of a sibling key, above which the same word elsewhere is ignored


def _nearest_keys(path: Path) -> str:
    """Suggestion for an unknown key at `path`."""
    known = list(keys_at(JobSpec, path[:-1]))
    nearest = get_close_matches(str(path[-1]), known, n=1, cutoff=SURELY_MEANT)
    elsewhere = [dotted(other) for other in all_keys(JobSpec) if other[-1] == path[-1]]
    if not nearest and len(elsewhere) == 1:
        return f"nearest known key: {elsewhere[0]}"
    nearest = nearest or get_close_matches(str(path[-1]), known, n=1)
    if nearest:
        return f"nearest known key: {dotted((*path[:-1], nearest[0]))}"
    return f"known here: {', '.join(known)}"
