"""Signals end a command and what it has started, also where a script has SIGINT ignored at its start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.cli.terminal import signals
from orchestrator.cli.terminal.exit_codes import EXIT_CODES

ROOT = Path(__file__).parents[4]
# A command that has started a process and waits, as `tracking ui` does.
COMMAND = """
import subprocess, sys, time, typer
from orchestrator.cli import main

def waits():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    try:
        print(child.pid, flush=True)
        while child.poll() is None:  # a signal that comes just before a long wait begins would not end it
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()

main.app = typer.Typer()
main.app.command()(waits)
sys.argv = ["orchestrator"]
main.command()
"""
# One that takes its time to end what it has started.
SLOWLY = """
import time, typer
from orchestrator.cli import main
from orchestrator.cli.terminal import signals

def waits():
    try:
        print("begun", flush=True)
        while True:  # a signal that comes just before a long sleep begins would not end it
            time.sleep(0.05)
    finally:
        with signals.ignored():
            print("ending", flush=True)
            input()
            print("ended", flush=True)

main.app = typer.Typer()
main.app.command()(waits)
main.command()
"""


CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), CODES)
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


def test_further_signals_are_ignored_while_a_command_ends_what_it_has_started() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "ending\n"
    for number, _ in CODES:
        process.send_signal(number)
    out, _ = process.communicate("\n", timeout=200)
    assert (out, process.returncode) == ("ended\n", 143)


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_code_of_each_signal_is_documented(number: signal.Signals, code: int) -> None:
    assert code == signals.EXIT_CODE_OF_SIGNALS + number and number in signals.NUMBERS
    assert number.name in EXIT_CODES[code]
