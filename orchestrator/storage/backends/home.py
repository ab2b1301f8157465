"""Directory of a user's own files on a machine."""

import os
from pathlib import Path


def home() -> Path:
    """`~/.orchestrator`; ORCHESTRATOR_HOME moves it."""
    named = os.environ.get("ORCHESTRATOR_HOME")
    return (Path(named).expanduser() if named else Path.home() / ".orchestrator").absolute()
