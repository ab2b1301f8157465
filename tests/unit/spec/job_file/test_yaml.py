from typing import Any

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job_file.yaml import MAX_DEPTH, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("0", 0),
        ("3.0e-3", 3.0e-3),
        ("1e-3", 1e-3),
        ("1E3", 1e3),
        (".5", 0.5),
        ("2.", 2.0),
        ("null", None),
        ("~", None),
        ("", None),
        ("true", True),
        ("FALSE", False),
        ("'true'", "true"),
        ('"3"', "3"),
        ("2..4", "2..4"),
        ("007", "007"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("1:30", "1:30"),
        ("2026-11-24", "2026-11-24"),
        (".nan", ".nan"),
        ("e3", "e3"),
        ("9" * 5000, "9" * 5000),
        ("tRuE", "tRuE"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    document = read_document(f"key: {text}\n", "f")
    assert document.problems == []
    assert document.value == {"key": value}
    assert type(document.value["key"]) is type(value)


def test_nested_values_and_their_places() -> None:
    document = read_document("a: 1\nb:\n  - {c: 2}\n  - [3, x]\n", "f")
    assert document.value == {"a": 1, "b": [{"c": 2}, [3, "x"]]}
    assert document.places == {
        (): (1, 1),
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", 0): (3, 5),
        ("b", 0, "c"): (3, 6),
        ("b", 1): (4, 5),
        ("b", 1, 0): (4, 6),
        ("b", 1, 1): (4, 9),
    }
    assert document.written(("b", 0, "d", "e")) == ("b", 0)
    assert document.written(("z",)) == ()


@pytest.mark.parametrize(
    ("text", "place", "path", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", (3, 1), "a", "stands on line 1 already"),
        ("a: {b: 1, b: 2}\n", (1, 11), "a.b", "must stand once"),
        ("a: &x 1\n", (1, 4), "a", "anchors are not allowed"),
        ("a: [*x]\n", (1, 5), "a.0", "aliases are not allowed"),
        ("a: !!str 1\n", (1, 4), "a", "tags are not allowed"),
        ("a: !!python/object:os.system {}\n", (1, 4), "a", "tags are not allowed"),
        ("!!map {a: 1}\n", (1, 1), "", "tags are not allowed"),
        ("&k a: 1\n", (1, 1), "a", "anchors are not allowed"),
        ("a: yes\n", (1, 1 + 3), "a", "write true or false, or quote it; got yes"),
        ("a: Off\n", (1, 4), "a", "got Off"),
    ],
)
def test_what_is_refused_keeps_the_rest_readable(text: str, place: tuple[int, int], path: str, words: str) -> None:
    (problem,) = read_document(text, "f").problems
    assert (problem.line, problem.column, problem.path) == (*place, path)
    assert words in problem.message


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\n---\nb: 2\n", (2, 1), "second one begins here"),
        ("a: [1, 2\n", (2, 1), "must be YAML"),
        ("a: b: c\n", (1, 5), "must be YAML"),
        ("\ta: 1\n", (1, 1), "must be YAML"),
        ("a: 1\nb: \x07\n", (2, 4), "U+0007"),
        ("[a]: 1\n", (1, 1), "a key must be plain text"),
        ("[" * (MAX_DEPTH + 1), (1, MAX_DEPTH + 1), "must not nest deeper"),
    ],
    ids=["documents", "unclosed", "two-colons", "tab", "control", "list-key", "deep"],
)
def test_what_ends_reading(text: str, place: tuple[int, int], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_document(text, "f")
    problem = caught.value.problems[-1]
    assert (problem.line, problem.column) == place
    assert words in problem.message


def test_deepest_nesting_allowed() -> None:
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert read_document(text, "f").problems == []


def test_problems_found_before_reading_ended_are_kept() -> None:
    with pytest.raises(SpecError) as caught:
        read_document("a: yes\n---\nb: 1\n", "f")
    assert [problem.line for problem in caught.value.problems] == [1, 2]


def test_of_a_duplicate_key_the_last_is_read() -> None:
    document = read_document("a: 1\na: 2\n", "f")
    assert document.value == {"a": 2}
    assert document.places[("a",)] == (2, 1)
