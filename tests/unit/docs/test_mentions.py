"""What the pages name exists: files, functions, and the targets of links."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = (".", "docs", "benchmarks", "cluster", "dashboards")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
MENTION = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.py)(?::([\w.]+))?`")
METHOD = re.compile(r"`([A-Z]\w+\.\w+)`")
TEST_NAME = re.compile(r"`(test_\w+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(#[^)]*)?\)")

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@by_page
def test_files_and_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [f"{file}:{name}" for file, name in MENTION.findall(text) if not _exists(file, name)] == []


@by_page
def test_methods_named_without_their_file_exist(page: Path) -> None:
    assert set(METHOD.findall(page.read_text(encoding="utf-8"))) <= _defined_in_the_package()


@by_page
def test_named_tests_exist(page: Path) -> None:
    assert set(TEST_NAME.findall(page.read_text(encoding="utf-8"))) <= _known_tests()


@by_page
def test_plans_are_in_the_roadmap_only(page: Path) -> None:
    assert page.name == "roadmap.md" or not re.search(r"\bPlanned(:| is\b| are\b)", page.read_text(encoding="utf-8"))


@by_page
def test_links_between_pages_resolve(page: Path) -> None:
    targets = [target for target, _ in LINK.findall(page.read_text(encoding="utf-8"))]
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_a_mention_that_is_wrong_is_found() -> None:
    assert _exists("worker/trainer.py", "Trainer.run")
    assert _exists("policy/lifecycle.py", "RULES")
    assert _exists("docs/generate.py", "")
    assert not _exists("worker/trainer.py", "Trainer.leap")
    assert not _exists("worker/nobody.py", "")


def _exists(file: str, name: str) -> bool:
    """Whether `file`, below the repository, the package or `docs/`, defines `name`; any file if `name` is empty."""
    found = [folder / file for folder in (ROOT, ROOT / "orchestrator", ROOT / "docs", ROOT / "benchmarks")]
    paths = [path for path in found if path.is_file()]
    return any(not name or name in _defined(path) for path in paths)


@cache
def _defined_in_the_package() -> frozenset[str]:
    return frozenset(name for file in (ROOT / "orchestrator").rglob("*.py") for name in _defined(file))


@cache
def _known_tests() -> frozenset[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))


@cache
def _defined(path: Path) -> frozenset[str]:
    return frozenset(_names(ast.parse(path.read_text(encoding="utf-8")), ""))


def _names(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """Dotted names of everything defined in a module or class."""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield prefix + child.name
            yield from _names(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            yield prefix + child.name
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))
