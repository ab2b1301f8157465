"""The commands and job files of the pages: options are those of the command, and what needs no cluster is run."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from orchestrator.cli.main import app
from orchestrator.client import OrchestratorClient
from orchestrator.spec.job_file.loading import load_job

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAKE = re.compile(r"(?:^|`)make ([\w-]+)", re.MULTILINE)
INLINE = re.compile(r"`(orchestrator [^`]+)`")
# Of the README, in its order: they take seconds and leave nothing.
RUN = ("job validate", "job schema", "cluster up", "ls", "cluster down")


def _commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every `orchestrator VERB …` in a block or in the text, without comment and prompt."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "\n".join(body for language, body in BLOCK.findall(text) if not language)
        lines = [line.partition("  #")[0].removeprefix("$ ").strip() for line in blocks.splitlines()]
        found = [line for line in lines if line.startswith("orchestrator ")] + INLINE.findall(text)
        yield from ((page.name, command) for command in dict.fromkeys(found))


COMMANDS = list(_commands())


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_on_a_page_has_an_existing_verb_and_existing_options(page: str, command: str) -> None:
    words = [word for part in shlex.split(command)[1:] for word in part.strip("[]").split("=", 1)[:1]]
    node = get_command(app)
    while words and isinstance(node, typer.core.TyperGroup):
        if words[0] in ("--help", "|"):
            return
        assert words[0] in node.commands, f"{page} says `{command}`"
        node = node.commands[words.pop(0)]
    known = {option for parameter in node.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-")} <= known, f"{page} says `{command}`"


def test_the_readme_has_every_verb() -> None:
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    verbs = {verb for verb, command in group.commands.items() if not command.hidden}
    assert verbs == {command.split()[1] for page, command in COMMANDS if page == "README.md"}


@pytest.mark.ray
@pytest.mark.journey
def test_commands_of_the_readme_run(tmp_path: Path) -> None:
    readme = [command for page, command in COMMANDS if page == "README.md"]
    chosen = [command for command in readme if command.removeprefix("orchestrator ").startswith(RUN)]
    assert len(chosen) == len(RUN)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env = {**kept, "ORCHESTRATOR_HOME": str(tmp_path), "NO_COLOR": "1"}
    said = {}
    for command in chosen:
        words = [sys.executable, "-m", "orchestrator.cli.main", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        said[command] = done
    assert "is valid" in said[chosen[0]].stderr
    assert json.loads(said["orchestrator job schema"].stdout)["title"] == "Job file"
    assert "is down" in said["orchestrator cluster down"].stderr


def _jobs() -> list[tuple[str, str]]:
    return [
        (page.name, body)
        for page in PAGES
        for language, body in BLOCK.findall(page.read_text(encoding="utf-8"))
        if language == "yaml" and body.startswith("schema: v1")
    ]


@pytest.mark.parametrize(("page", "text"), _jobs(), ids=[f"{page}-{n}" for n, (page, _) in enumerate(_jobs())])
def test_a_job_of_a_page_is_valid(page: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    load_job(tmp_path / "job.yaml")


def test_the_jobs_of_the_repository_are_valid() -> None:
    names = [load_job(job).name for job in sorted((ROOT / "jobs").glob("*.yaml"))]
    assert "quickstart" in names and len(set(names)) == len(names)


def test_python_of_the_readme_uses_what_the_client_has() -> None:
    (snippet,) = [body for language, body in BLOCK.findall((ROOT / "README.md").read_text()) if language == "python"]
    used = set(re.findall(r"client\.(\w+)\(", snippet))
    assert used >= {"submit", "get", "scale", "wait", "events"}
    assert all(callable(getattr(OrchestratorClient, name)) for name in used)
    compile(snippet, "README.md", "exec")


def test_make_targets_that_pages_name_exist() -> None:
    named = {target for page in PAGES for target in MAKE.findall(page.read_text(encoding="utf-8"))}
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= known
