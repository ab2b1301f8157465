"""Signals end a command and what it has started, also where a script has SIGINT ignored at its start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[4]
# A command that has started a process and waits, as `tracking ui` does.
COMMAND = """
import subprocess, sys, typer
from orchestrator.cli import main

def waits():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        print(child.pid, flush=True)
        child.wait()
    finally:
        child.kill()
        child.wait()

main.app = typer.Typer()
main.app.command()(waits)
sys.argv = ["orchestrator"]
main.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_command_in_the_background_of_a_script_ends_with_what_it_started(number: int, code: int) -> None:
    def as_in_a_script() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests were started by nohup

    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=as_in_a_script,
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    process.send_signal(number)
    assert process.wait(200) == code
    assert not child.is_running()
