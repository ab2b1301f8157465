"""The verbs: every one has its panel, its `-o json` a type, and old ones are refused with the name of the new one."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from orchestrator.cli.main import app
from orchestrator.cli.retired import OPTIONS, VERBS
from tests.unit.cli.test_main import Done, here, orchestrator

__all__ = ["here", "orchestrator"]  # fixtures

WANTED = """
    init doctor run submit ls status wait logs events top report scale pause resume stop rm set
    job:validate,plan,schema checkpoint:ls,verify,rm model:export,eval,generate data:prepare check:data,replay
    fault:kill-worker curriculum:set tracking:ui,sync cluster:up,status,down
"""


def verbs() -> Iterator[tuple[str, typer.core.TyperCommand]]:
    root = get_command(app)
    assert isinstance(root, TyperGroup)
    for name, command in root.commands.items():
        inner = command.commands.items() if isinstance(command, TyperGroup) else [("", command)]
        yield from ((f"{name} {verb}".strip(), found) for verb, found in inner if not command.hidden)  # type: ignore[misc]


KNOWN = dict(verbs())
OUTPUTS = runpy.run_path(str(Path(__file__).parents[3] / "docs" / "generate.py"))["OUTPUTS"]


def options_of(verb: str) -> set[str]:
    return {option for parameter in KNOWN[verb].params for option in parameter.opts}


def test_the_verbs_are_there() -> None:
    groups = [word.partition(":") for word in WANTED.split()]
    wanted = {f"{name} {verb}".strip() for name, _, inner in groups for verb in inner.split(",")}
    assert wanted <= set(KNOWN)


@pytest.mark.parametrize("old", VERBS)
def test_an_old_verb_is_refused_by_name(orchestrator: Callable[..., Done], old: str) -> None:
    done = orchestrator(old, "x", "--help")
    assert done.returncode == 2 and f"`orchestrator {old}` is now `orchestrator {VERBS[old]}`" in done.stderr
    assert old not in KNOWN and VERBS[old] in KNOWN


@pytest.mark.parametrize(("verb", "old"), [(verb, old) for verb, found in OPTIONS.items() for old in found])
def test_an_old_option_is_refused_by_name(orchestrator: Callable[..., Done], verb: str, old: str) -> None:
    new = OPTIONS[verb][old]
    for words in ([old, "3"], [f"{old}=3" if old.startswith("--") else f"{old}3"]):
        done = orchestrator(*verb.split(), "x", *words)
        assert done.returncode == 2 and f"{old} of `orchestrator {verb}` is now {new}" in done.stderr
    assert old not in options_of(verb) and new in options_of(verb)


@pytest.mark.parametrize("verb", KNOWN)
def test_one_spelling_per_thing(verb: str) -> None:
    options = options_of(verb)
    assert ("--workers" in options) == ("-w" in options)
    assert ("--output" in options) == ("-o" in options) == (verb in OUTPUTS)
    assert not options & {"--to", "--from", "-n", "--directory"}
    assert verb not in ("logs", "events") or {"--tail", "--since", "-f"} <= options


def test_init_writes_a_job_that_is_valid_and_overwrites_nothing(here: Path, orchestrator: Callable[..., Done]) -> None:
    assert orchestrator("init", "--out", "new.yaml", "--name", "first").stdout == "new.yaml\n"
    assert "run first" in orchestrator("job", "validate", "new.yaml").stderr
    before = (here / "new.yaml").read_text()
    refused = orchestrator("init", "--out", "new.yaml", "--name", "second")
    assert refused.returncode == 2 and "new.yaml exists already" in refused.stderr
    assert (here / "new.yaml").read_text() == before
    assert orchestrator("init", "--out", "nowhere/new.yaml").returncode == 104


def test_the_version(orchestrator: Callable[..., Done]) -> None:
    assert orchestrator("--version").stdout.startswith("orchestrator 0.")
