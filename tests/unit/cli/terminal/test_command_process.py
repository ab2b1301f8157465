"""A signal ends a command that waits for a mount which hangs, and reaches the command once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.spec.job import JobSpec
from tests.support.call_faults import CallFault, Effect
from tests.support.fuse_disk import fuse_disk
from tests.unit.policy.stories import eventful, write

ROOT = Path(__file__).parents[4]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
PATIENCE_S, SOON_S = 60.0, 5.0
JOB = JobSpec.model_validate({"schema": "v1", "name": "books"})
# A command that ends what it has started in its own time.
SLOWLY = """
import time, typer
from orchestrator.cli import main

def waits():
    try:
        print("begun", flush=True)
        time.sleep(600)
    finally:
        time.sleep(0.5)
        print("ended", flush=True)

main.app = typer.Typer()
main.app.command()(waits)
main.command()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["status books", "logs books -f", "ls"])
def test_a_signal_ends_a_command_whose_run_storage_hangs(
    tmp_path: Path, command: str, number: signal.Signals, code: int
) -> None:
    with fuse_disk(tmp_path / "disk", 16) as disk:
        runs, shown = disk.path / "runs", tmp_path / "shown"
        write(eventful(), runs / "books", JOB)
        with disk.having(CallFault("*", Effect.HANG)), shown.open("w") as out:
            words = [sys.executable, "-m", "orchestrator.cli.main", *command.split(), "--storage", str(runs)]
            process = subprocess.Popen(words, env=ENV, stdout=out, stderr=out)
            disk.await_hits(1)
            (left,) = psutil.Process(process.pid).children()
            sent_s = time.monotonic()
            process.send_signal(number)
            assert process.wait(PATIENCE_S) == code and time.monotonic() - sent_s < SOON_S
            assert f"{runs}" in shown.read_text() and "does not answer" in shown.read_text()
            assert f"process {left.pid}, which waits for that" in " ".join(shown.read_text().split())
            assert left.is_running()
        assert psutil.wait_procs([left], timeout=PATIENCE_S)[1] == []


def test_a_signal_to_the_process_group_interrupts_a_command_once() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY], env=ENV, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert (out, process.returncode) == ("ended\n", 143)


def test_a_command_ends_with_the_process_that_was_started() -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOWLY], env=ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.kill()
    assert process.communicate(timeout=PATIENCE_S) == ("ended\n", None)
