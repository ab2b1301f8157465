"""The guides of docs/extending.md are followed to the letter, each in a copy of the repository, and their tests run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GUIDES = re.split(r"^## ", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"# ((?:orchestrator|tests)/\S+\.py)\n")


@pytest.mark.parametrize("guide", GUIDES, ids=[guide.partition("\n")[0] for guide in GUIDES])
def test_a_guide_that_is_followed_works(guide: str, tmp_path: Path) -> None:
    for folder in ("orchestrator", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    made = []
    for language, text in BLOCK.findall(guide):
        if language == "diff":
            _run(tmp_path, "git", "apply", "--recount", "-", text=text)
            continue
        path = PATH.match(text)
        assert path is not None, text.partition("\n")[0]
        assert not (tmp_path / path[1]).exists(), f"{path[1]} is there already"
        (tmp_path / path[1]).write_text(text[path.end() :])
        made.append(path[1])
    tests = [path for path in made if path.startswith("tests/")]
    assert tests and len(made) + len(re.findall(r"^--- a/", guide, re.MULTILINE)) > 2
    _run(tmp_path, sys.executable, "-m", "ruff", "check", *made)
    _run(tmp_path, sys.executable, "-m", "ruff", "format", "--check", *made)
    _run(tmp_path, sys.executable, "-m", "pytest", "-q", *tests)


def _run(directory: Path, *command: str, text: str | None = None) -> None:
    done = subprocess.run(command, cwd=directory, input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
