"""Commands that are imported when they are called: `orchestrator status` doesn't wait for the imports of all others."""

from collections.abc import MutableMapping
from functools import cache
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

# The module in `orchestrator.cli.commands` of each verb, or of each group of verbs, in the order of `--help`.
MODULES = {
    "demo": "demo",
    "init": "begin",
    "doctor": "begin",
    "run": "run",
    "submit": "runs",
    "ls": "runs",
    "status": "runs",
    "wait": "runs",
    "logs": "outputs",
    "events": "outputs",
    "top": "top",
    "report": "outputs",
    "scale": "steer",
    "pause": "steer",
    "resume": "steer",
    "stop": "steer",
    "rm": "steer",
    "set": "steer",
    "job": "job",
    "checkpoint": "checkpoint",
    "experts": "experts",
    "model": "model",
    "data": "data",
    "check": "check",
    "fault": "steer",
    "curriculum": "steer",
    "tracking": "tracking",
    "cluster": "cluster",
    "drive": "remote",
    "answer": "remote",
}


@cache
def commands_of(module: str) -> dict[str, Any]:
    """Import a module of `orchestrator.cli.commands`. Returns the commands that its `register` adds, by verb."""
    app = typer.Typer()
    import_module(f"orchestrator.cli.commands.{module}").register(app)
    return dict(get_group(app).commands)


class LazyGroup(TyperGroup):
    """The verbs of `MODULES`. `commands` has all of them, and imports all."""

    @property
    def commands(self) -> MutableMapping[str, Any]:
        return {verb: self.get_command(None, verb) for verb in MODULES}

    @commands.setter
    def commands(self, commands: MutableMapping[str, Any]) -> None:
        """Typer sets those of the app itself, which has none."""
        self._loaded: dict[str, Any] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in MODULES and cmd_name not in self._loaded:
            self._loaded |= commands_of(MODULES[cmd_name])
        return self._loaded.get(cmd_name)
