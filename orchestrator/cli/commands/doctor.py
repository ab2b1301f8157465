"""`doctor`: check this machine for problems."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.terminal.options import Output
from orchestrator.cli.terminal.output import Format, show, show_json


def doctor(
    storage: Annotated[Path, typer.Option("--storage", metavar="DIR", help="Run storage to check.")] = Path("runs"),
    output: Output = Format.TEXT,
) -> None:
    """Check this machine for problems. Changes nothing. Exits 100 if something would fail."""
    from orchestrator.cluster.doctor import Verdict, examine

    found = list(examine(storage))
    if output is Format.JSON:
        show_json([asdict(finding) for finding in found])
    else:
        for finding in found:
            show(f"{finding.verdict:<8} {finding.subject:<10} {finding.text}")
            if finding.remedy:
                show(f"{'':<19} {finding.remedy}")
    if any(finding.verdict is Verdict.FAULT for finding in found):
        raise typer.Exit(100)


def register(app: typer.Typer) -> None:
    app.command(rich_help_panel="Job files")(doctor)
