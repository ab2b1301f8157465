"""The table of verbs and their modules."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import orchestrator.cli.commands
from orchestrator.cli.lazy import MODULES, commands_of
from orchestrator.cli.main import app

FILES = Path(str(orchestrator.cli.commands.__file__)).parent.glob("*.py")


@pytest.mark.parametrize("module", sorted(file.stem for file in FILES if file.stem != "__init__"))
def test_a_module_has_the_verbs_of_the_table(module: str) -> None:
    assert sorted(commands_of(module)) == sorted(verb for verb, home in MODULES.items() if home == module)


def test_the_group_has_every_verb_in_the_order_of_the_table() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert list(commands) == list(MODULES)
    assert all(command.name == verb for verb, command in commands.items())


def test_the_first_live_screen_waits_for_no_big_import() -> None:
    script = (
        "import sys, orchestrator.cli.commands.top, orchestrator.cli.top.client_process, orchestrator.cli.top.screen\n"
        "big = {'ray', 'numpy', 'pydantic'} & sys.modules.keys()\n"
        "sys.exit(str(big) if big else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["client", "controller.controller", "scheduler.scheduler", "tracking.tracker"])
def test_what_few_commands_or_one_thread_use_is_imported_there(module: str) -> None:
    script = (
        f"import sys, orchestrator.{module}\n"
        "rare = {'mlflow', 'matplotlib', 'textual', 'pandas', 'pyarrow', 'sqlalchemy', 'torch'} & sys.modules.keys()\n"
        "sys.exit(str(rare) if rare else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
