"""Whether tests on the emulated GPU notice a tensor that is made on the wrong device.

    python -m tests.device_mistakes [--only orchestrator/model/loss.py] [--results FILE]

In a copy of the repository, in which the tests must pass as it is, each argument `device=` of a call in the folders
that hold tensors is taken out, one at a time, and the emulated tests are run until one fails. A mistake that none
notices may be in code that they don't reach: then the call is made to raise, and the tests are run again. Prints each
one, and how many of those reached were caught.
Takes two hours or more; with a results file it goes on where it was, while the sources are the same.
"""

import argparse
import ast
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("comm", "engine", "model", "state", "worker")
# After the unit tests of the same module, the fastest first: a mistake that those notice costs seconds.
TESTS = (
    ("tests/unit/model", "tests/unit/comm", "tests/unit/state", "tests/unit/engine", "tests/unit/worker"),
    ("tests/integration/test_devices.py",),
    (
        "tests/integration/test_compression.py",
        "tests/integration/test_transfer.py",
        "tests/integration/test_buckets.py",
    ),
    ("tests/integration/test_moves.py", "tests/integration/test_ladder.py"),
)
LEFT_OUT = "not slow and not journey and not long_emulated"
TIMEOUT_S = 900.0
CAUGHT, MISSED, BASELINE = "caught", "missed", "baseline"
NO_TESTS = 5  # pytest's exit code where none is selected


@dataclass(frozen=True)
class Place:
    """A call's argument `device=` in a file: its bytes [start, stop), with the comma that separates it."""

    file: Path
    line: int
    start: int
    stop: int
    call: tuple[int, int]

    def without(self, source: bytes) -> bytes:
        return source[: self.start] + source[self.stop :]

    def raising(self, source: bytes) -> bytes:
        start, stop = self.call
        return source[:start] + b"(_ for _ in ()).throw(AssertionError('reached'))" + source[stop:]


def places(file: Path) -> Iterator[Place]:
    """All arguments `device=` in calls of a file."""
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
            if keyword.arg != "device":
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


def is_noticed(copy: Path, place: Place, content: bytes) -> bool:
    """Whether an emulated test fails with this content of the place's file."""
    file, before = copy / place.file, (copy / place.file).read_bytes()
    file.write_bytes(content)
    try:
        return any(_fails(copy, tests) for tests in (*_own_tests(place.file), *TESTS))
    finally:
        file.write_bytes(before)


def _own_tests(file: Path) -> Iterator[tuple[str, ...]]:
    own = Path("tests/unit", *file.parts[1:-1], f"test_{file.name}")
    if (ROOT / own).exists():
        yield (str(own),)


def _fails(copy: Path, tests: tuple[str, ...]) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--dist", "loadfile", "--device", "emulated"]
    try:
        done = subprocess.run(
            [*command, "-m", LEFT_OUT, "--timeout", "120", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:  # which is noticed too
        return True
    return done.returncode not in (0, NO_TESTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one file")
    parser.add_argument("--results", type=Path, help="what was found, a line each; known places are left out")
    given = parser.parse_args()
    only, results = given.only, given.results
    known = dict(_results(results)) if results is not None and results.exists() else {}
    files = (
        [ROOT / only] if only else [f for name in FOLDERS for f in sorted((ROOT / "orchestrator" / name).rglob("*.py"))]
    )
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="mistakes-") as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", ".mypy_cache"))
        if BASELINE not in known:
            if any(_fails(copy, tests) for tests in TESTS):
                print("tests fail without a mistake, so they can't show any: run them and mend them first")
                return 1
            if results is not None:
                with results.open("a") as file:
                    print(f"{BASELINE} passed", file=file)
        for place in shuffled(place for file in files for place in places(file)):
            source = (ROOT / place.file).read_bytes()
            name = f"{place.file}:{place.start}"
            verdict = known.get(name) or _verdict(copy, place, source)
            found.append(verdict)
            print(f"{place.file}:{place.line}: {verdict}", flush=True)
            if results is not None and name not in known:
                with results.open("a") as file:
                    print(f"{name} {verdict}", file=file)
    caught, reached = found.count(CAUGHT), found.count(CAUGHT) + found.count(MISSED)
    print(f"{caught} of {reached} mistakes in code that is reached were caught")
    return 0


def _results(file: Path) -> Iterator[tuple[str, str]]:
    for line in file.read_text().splitlines():
        name, _, verdict = line.partition(" ")
        yield name, verdict


def _verdict(copy: Path, place: Place, source: bytes) -> str:
    if is_noticed(copy, place, place.without(source)):
        return CAUGHT
    return MISSED if is_noticed(copy, place, place.raising(source)) else "not reached"


if __name__ == "__main__":
    sys.exit(main())
