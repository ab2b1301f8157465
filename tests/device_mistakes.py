"""Whether tests on the emulated GPU notice a tensor that is made on the wrong device.

    python -m tests.device_mistakes [--only orchestrator/model/loss.py] [--results FILE]

In a copy of the repository the emulated tests run once, and must pass; calls with an argument `device=` in the folders
that hold tensors note which tests reach them. Then each such argument is taken out, one at a time, and the tests that
reach it are run, the fastest of each file first, until one fails; after 56 that don't, the mistake counts as missed.
Prints each place, and how many of those reached were caught.
With a results file it goes on where it was, while the sources are the same.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("comm", "engine", "model", "state", "worker")
TESTS = (*(f"tests/unit/{folder}" for folder in ("model", "comm", "state", "engine", "worker")), "tests/integration")
LEFT_OUT = "not slow and not journey and not long_emulated"
PLUGIN = "tests.support.reached_places"
MARK = f'(__import__("{PLUGIN}").support.reached_places.mark(%d), '
PROCESSES = 2
BATCHES = (8, 16, 32)  # of the tests that reach a place: most mistakes are noticed by one of the first
TIMEOUT_S = 3600.0
CAUGHT, MISSED, NOT_REACHED, REACHED = "caught", "missed", "not reached", "reached"


@dataclass(frozen=True)
class Place:
    """A call's argument `device=` in a file: its bytes [start, stop), with the comma that separates it."""

    file: Path
    line: int
    start: int
    stop: int
    call: tuple[int, int]

    @property
    def name(self) -> str:
        return f"{self.file}:{self.start}"

    def without(self, source: bytes) -> bytes:
        return source[: self.start] + source[self.stop :]


def places(file: Path) -> Iterator[Place]:
    """All arguments `device=` in calls of a file, but those that name the default."""
    source = file.read_bytes()
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))

    def at(line: int, column: int) -> int:
        return begins[line - 1] + column

    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            is_default = isinstance(keyword.value, ast.Constant) and keyword.value.value == "cpu"
            if keyword.arg != "device" or is_default:
                continue
            start = at(keyword.lineno, keyword.col_offset)
            stop = at(keyword.value.end_lineno or 0, keyword.value.end_col_offset or 0)
            before = source[:start].rstrip()
            if before.endswith(b","):
                start = len(before) - 1
            elif source[stop : stop + 2] == b", ":
                stop += 2
            whole = at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)
            yield Place(file.relative_to(ROOT), keyword.lineno, start, stop, whole)


def shuffled(places: Iterable[Place]) -> list[Place]:
    """In an order that is always the same, and favours no folder in a run that is stopped."""
    found = list(places)
    random.Random(0).shuffle(found)
    return found


def marked(source: bytes, places: Mapping[int, Place]) -> bytes:
    """A file's content with a mark at each of its places, which have these numbers."""
    inserted = [(place.call[0], MARK % number) for number, place in places.items()]
    inserted += [(place.call[1], ")[1]") for place in places.values()]
    for at, text in sorted(inserted, reverse=True):
        source = source[:at] + text.encode() + source[at:]
    return source


def tests_by_place(found: list[Place]) -> dict[str, list[str]]:
    """Names of the tests that reach each place, the fastest first. Raises RuntimeError if a test fails."""
    with copied() as copy, tempfile.TemporaryDirectory(prefix="reached-") as notes:
        for file in {place.file for place in found}:
            numbers = {number: place for number, place in enumerate(found) if place.file == file}
            (copy / file).write_bytes(marked((copy / file).read_bytes(), numbers))
        options = ("-n", str(PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder", "-p", PLUGIN)
        if _fails(copy, *options, *TESTS, REACHED_DIR=notes):
            raise RuntimeError("tests fail without a mistake, so they can't show any: run them and mend them first")
        durations = {test: float(seconds) for seconds, test in _pairs(Path(notes, "durations"))}
        tests = defaultdict[str, set[str]](set)
        for number, test in _pairs(Path(notes, "reached")):  # no test: while a module is imported, by any of them
            tests[found[int(number)].name].update([test] if test else durations)
    return {place: sorted(reaching & durations.keys(), key=durations.__getitem__) for place, reaching in tests.items()}


def verdict_of(place: Place, tests: list[str]) -> str:
    """Whether one of the tests that reach the place fails without its argument, and passes with it."""
    if not tests:
        return NOT_REACHED
    tests, borders = one_of_each_file_first(tests), [0, *accumulate(BATCHES)]
    batches = [tests[start:stop] for start, stop in pairwise(borders)]
    with copied() as sound, copied() as mistaken:
        (mistaken / place.file).write_bytes(place.without((mistaken / place.file).read_bytes()))
        is_caught = any(_fails(mistaken, *batch) and not _fails(sound, *batch) for batch in batches if batch)
    return CAUGHT if is_caught else MISSED


def one_of_each_file_first(tests: list[str]) -> list[str]:
    """The first test of each file, then the second ones: those of a file notice much the same."""
    seen = Counter[str]()

    def number(test: str) -> int:
        seen[test.partition("::")[0]] += 1
        return seen[test.partition("::")[0]]

    return sorted(tests, key=number)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the repository."""
    with tempfile.TemporaryDirectory(prefix="mistakes-") as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".mypy_cache"))
        yield copy


def _fails(copy: Path, *arguments: str, **variables: str) -> bool:
    """Whether a test fails, or the time is over."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--device", "emulated", "-m", LEFT_OUT, "--timeout", "240"]
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", *arguments],
            cwd=copy,
            env=os.environ | variables | {"PYTHONPATH": str(copy)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def _pairs(file: Path) -> Iterator[tuple[str, str]]:
    for line in file.read_text().splitlines():
        first, _, rest = line.partition(" ")
        yield first, rest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one file")
    parser.add_argument("--results", type=Path, help="what was found, a line each; known places are left out")
    given = parser.parse_args()
    folders = [ROOT / "orchestrator" / name for name in FOLDERS]
    files = [ROOT / given.only] if given.only else [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    found = shuffled(place for file in files for place in places(file))
    known = dict(_pairs(given.results)) if given.results is not None and given.results.exists() else {}

    def note(name: str, what: str) -> None:
        known[name] = what
        if given.results is not None:
            with given.results.open("a") as file:
                print(name, what, file=file)

    if REACHED not in known:
        note(REACHED, json.dumps(tests_by_place(found)))
    tests: dict[str, list[str]] = json.loads(known[REACHED])

    def look(place: Place) -> None:
        if place.name not in known:
            note(place.name, verdict_of(place, tests.get(place.name, [])))
        print(f"{place.file}:{place.line}: {known[place.name]}", flush=True)

    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(look, found))
    verdicts = [known[place.name] for place in found]
    caught, reached = verdicts.count(CAUGHT), verdicts.count(CAUGHT) + verdicts.count(MISSED)
    print(f"{caught} of {reached} mistakes in code that is reached were caught; {len(found)} places")
    return 0


if __name__ == "__main__":
    sys.exit(main())
