"""The command against a real local cluster and Scheduler, with simulated workers."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster import local
from orchestrator.cluster.processes import is_running
from orchestrator.run_records.final_status import status_key
from tests.support.cli_user import JOB, Here
from tests.support.control import UNHURRIED
from tests.support.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]  # many processes that import Ray, on a busy machine


PATIENCE_S = 120.0


def _await_line(process: "subprocess.Popen[str]", text: str) -> str:
    """The first line on stderr that holds `text`."""
    assert process.stderr is not None
    seen = ""
    while text not in (line := process.stderr.readline()):
        assert line, f"it ended without {text!r}, with {process.wait()}:\n{seen}"
        seen += line
    return line


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    user = Here(tmp_path_factory.mktemp("user"))
    user("cluster", "up", "--cpus", "8")
    yield user
    user("cluster", "down", "--force")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    """A user without any cluster; whatever they leave is ended."""
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    yield Here(tmp_path)
    local.down()


@pytest.mark.journey
def test_a_run_is_submitted_scaled_and_read(here: Here) -> None:
    job = here.job("steered", train=JOB["train"] | {"max_steps": 100_000})
    assert here("submit", job).stdout == "steered\n"
    assert "steered exists already" in here("submit", job, expect=2).stderr
    here.until_event("steered", "activated")
    assert "allows 1 to 3" in here("scale", "steered", "--workers", "9", expect=2).stderr
    assert json.loads(here("scale", "steered", "-w", "3", "-o", "json").stdout)["workers"] == 3
    here.until_event("steered", "rescaled")
    assert "steered" in here("cluster", "down", expect=2).stderr
    assert json.loads(here("set", "steered", "priority=5", "-o", "json").stdout) == {"run_id": "steered", "priority": 5}
    assert "train.lr" in here("set", "steered", "train.lr=1", expect=2).stderr
    assert "has not ended" in here("rm", "steered", "--yes", expect=2).stderr
    assert "of waiting" in here("wait", "steered", "--timeout", "1", expect=101).stderr
    # As right after a resume: storage has an end, and the cluster has the run.
    live = json.loads(here("status", "steered", "-o", "json").stdout)
    past = here.run_dir("steered") / status_key(99)
    past.write_text(json.dumps(live | {"phase": "stopped"}))
    assert "orchestrator stop steered" in here("rm", "steered", "--yes", "--storage", "runs", expect=2).stderr
    past.unlink()
    here("stop", "steered")
    assert "stopped" in here("wait", "steered", expect=103).stdout
    assert here.until_ended("steered").phase == "stopped"

    listed = {status["run_id"]: status for status in json.loads(here("ls", "-o", "json").stdout)}
    assert listed["steered"]["phase"] == "stopped"
    assert re.search(r"steered +5 +stopped", here("ls").stdout)
    assert "2 -> 3 workers" in here("status", "steered").stdout
    kinds = [event["kind"] for event in json.loads(here("events", "steered", "-o", "json").stdout)]
    assert kinds[0] == "submitted" and kinds[-1] == "ended" and kinds.count("activated") == 2
    assert "each exactly once, in order" in here("check", "data", "steered", "--storage", "runs").stdout
    assert json.loads(here("check", "data", "steered", "-o", "json").stdout)["ok"]
    assert "controller" in here("logs", "steered").stdout
    here.run_dir("steered").rename(here.run_dir("moved"))  # no cluster knows this one
    assert "each exactly once" in here("check", "data", "moved").stdout
    here.run_dir("moved").rename(here.run_dir("steered"))
    assert "has ended: it is stopped" in here("scale", "steered", "-w", "2", expect=2).stderr
    for verb in (["status"], ["logs"], ["events"], ["stop"], ["pause"], ["resume"], ["scale", "-w", "2"]):
        assert "Did you mean `steered`?" in here(*verb, "steerd", expect=102).stderr
    removed = json.loads(here("rm", "steered", "--yes", "-o", "json").stdout)
    assert removed == {"run_id": "steered", "run_dir": str(here.run_dir("steered"))}
    assert not here.run_dir("steered").exists() and "steered" not in here("ls").stdout
    assert "nobody" in here("wait", "nobody", expect=102).stderr


@pytest.mark.journey
def test_a_run_is_paused_and_resumes_at_another_world_size(here: Here) -> None:
    slow = {
        "train": JOB["train"] | {"max_steps": 300},
        "envs": {"SIM_STEP_S": "0.4"},  # two minutes, in which commands start on a busy machine
        "checkpoint": {"every": 10, "keep_last": 100},
    }
    assert here("run", "-d", here.job("sleeper", **slow)).stdout == "sleeper\n"
    here.until_event("sleeper", "checkpoint")
    assert "is active" in here("resume", "sleeper", expect=2).stderr
    here("pause", "sleeper")
    paused = here.until_ended("sleeper")
    assert paused.phase == "paused" and paused.checkpoint_step == paused.step - 1
    listed = json.loads(here("checkpoint", "ls", "sleeper", "-o", "json").stdout)
    assert listed[-1]["step"] == paused.checkpoint_step
    assert "is whole" in here("checkpoint", "verify", "sleeper").stderr
    assert "no checkpoint of step 5; it holds 9" in here("resume", "sleeper", "--step", "5", expect=102).stderr
    assert here("resume", "sleeper", "--step", "9", "-w", "3").stdout == "sleeper\n"
    here.until_event("sleeper", "activated", 2)
    here.hurry("sleeper")
    done = here.until_ended("sleeper")
    assert done.phase == "succeeded" and done.step == 300
    assert "each exactly once" in here("check", "data", "sleeper").stdout
    # The simulated run's tracker has told MLflow nothing: all of it comes from the journal.
    assert "MLflow has everything" in here("tracking", "sync", "sleeper").stderr
    store = sqlite3.connect(here.directory / "runs" / "mlflow.db")
    assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    losses = store.execute("SELECT step FROM metrics WHERE key = 'train/loss'").fetchall()
    store.close()
    assert sorted(step for (step,) in losses) == list(range(300))
    assert "has done all its 300 steps" in here("resume", "sleeper", expect=2).stderr
    shard = next(Path(str(done.checkpoint)).glob("shard-*"))
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    told = here("resume", "sleeper", expect=104).stderr
    assert shard.name in told and "The newest good checkpoint before it is" in told


@pytest.mark.parametrize(("number", "at_start"), [(signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)])
def test_mlflow_is_served_until_a_signal_and_leaves_nothing(
    alone: Here, number: signal.Signals, at_start: signal.Handlers
) -> None:
    """SIGINT also where it is ignored at the start, as a shell script does for what it starts in the background."""
    before = signal.signal(number, at_start)  # the command inherits what is ignored
    process = alone.start(
        "tracking", "ui", "--uri", f"sqlite:///{alone.directory}/other.db", "--port", str(free_port())
    )
    signal.signal(number, before)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert answer.read() == b"OK"
    served = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 0
    assert psutil.wait_procs(served, timeout=PATIENCE_S)[1] == []


def test_where_no_run_was_stored_there_is_nothing_to_serve(alone: Here) -> None:
    assert "holds no mlflow.db" in alone("tracking", "ui", expect=2).stderr


@pytest.mark.journey
def test_logs_are_followed_to_the_end(here: Here) -> None:
    assert json.loads(here("submit", here.job("followed"), "-o", "json").stdout) == {"run_id": "followed"}
    watching = here.start("status", "followed", "--watch", "-o", "json")
    reading = [
        here.start(*command, "--storage", "runs", "-o", "json")
        for command in (("events", "followed", "-f"), ("logs", "followed", "-f"), ("status", "followed", "--watch"))
    ]
    happened = here("events", "followed", "-f", "-o", "json").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in happened][:: len(happened) - 1] == ["submitted", "ended"]
    watched = [json.loads(line) for line in watching.communicate(timeout=PATIENCE_S)[0].splitlines()]
    assert watched[-1]["phase"] == "succeeded" and watched[-1]["step"] == 40
    lines = here("logs", "followed", "-f").stdout.splitlines()
    assert "succeeded" in lines[-1]
    events, logs, seen = (process.communicate(timeout=PATIENCE_S)[0].splitlines() for process in reading)
    # The two read the end of the run at different moments: when its status was published isn't the same.
    assert events == happened and json.loads(seen[-1]) | {"as_of_time": 0} == watched[-1] | {"as_of_time": 0}
    assert {json.loads(line)["source"] for line in logs} == {line.split()[2] for line in lines}
    assert lines == sorted(lines, key=lambda line: line[:23])


def test_a_job_without_room_fails_with_the_free_resources(here: Here) -> None:
    started_s = time.monotonic()
    refused = here("submit", here.job("large", resources={"cpus": 50}), "--timeout", "10", expect=105)
    assert refused.stderr.count("Waiting for room: 1 worker of 50 CPU is the least that large may have") == 1
    assert "room for 0" in refused.stderr and " CPU" in refused.stderr and "Nothing was started." in refused.stderr
    assert time.monotonic() - started_s >= 9.0
    assert not here.run_dir("large").exists()


@pytest.mark.journey
def test_run_in_the_foreground_uses_the_cluster_that_is_up(here: Here) -> None:
    grows = JOB["workers"] | {"schedule": [{"at_step": 4, "workers": 3}]}
    process = here.start("run", here.job("seen", workers=grows, envs={"SIM_STEP_S": "1.5"}))
    here.until_event("seen", "activated", 2)
    here.hurry("seen")
    stdout, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, stderr
    assert stdout.startswith("run              seen: succeeded, 40 of 40 steps in ")
    changed = re.search(r"2 -> 3 workers at step (\d+)", stdout)
    assert changed and int(changed[1]) >= 4  # later, where the third isn't ready by then
    assert "0 steps lost" in stdout
    assert "step-00000039" in stdout
    assert "seen training" in stderr and "Stopped" not in stderr
    here("cluster", "status")


def test_a_failed_run_exits_100_and_names_the_reason(here: Here) -> None:
    job = here.job("broken", workers=1, envs={"SIM_STEP_S": "0.02", "SIM_DIE": "all:warming"})
    failed = here("run", job, expect=100)
    assert "broken failed" in failed.stderr and "Traceback" not in failed.stderr


@pytest.mark.journey
def test_run_brings_a_cluster_and_takes_it_away(alone: Here) -> None:
    done = alone("run", alone.job("whole"), "--local")
    assert "whole: succeeded" in done.stdout
    assert "Started Ray" in done.stderr and "Stopped the Ray" in done.stderr
    assert local.status() is None
    assert "There is no cluster" in alone("ls").stderr
    assert "succeeded" in alone("status", "whole").stdout  # from run storage
    assert "each exactly once" in alone("check", "data", "whole").stdout


@pytest.mark.journey
def test_an_interrupt_detaches_and_the_run_continues(alone: Here) -> None:
    process = alone.start("run", alone.job("lasting", train=JOB["train"] | {"max_steps": 900}, envs=UNHURRIED))
    _await_line(process, "lasting training")
    process.send_signal(signal.SIGINT)
    told = _await_line(process, "Detached")
    process.send_signal(signal.SIGINT)  # an impatient one changes nothing
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 101 and stderr == ""
    assert "Detached" in told and "logs lasting -f" in told
    alone.hurry("lasting")
    assert alone.until_ended("lasting").step == 900
    alone("cluster", "down")
    assert local.status() is None


@pytest.mark.parametrize("verb", ["run", "demo"])
def test_sigterm_detaches_from_a_run_in_a_cluster_that_was_up_before(here: Here, verb: str) -> None:
    job = here.job("left", train=JOB["train"] | {"max_steps": 900}, envs=UNHURRIED)
    process = here.start(*(["run", job] if verb == "run" else ["demo", "--name", "shown"]))
    name = "left" if verb == "run" else "shown"
    _await_line(process, f"{name} training")
    process.send_signal(signal.SIGTERM)
    _await_line(process, f"Detached; run {name} continues")
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 101
    here.hurry(name)
    assert here.until_ended(name).phase == "succeeded"


@pytest.mark.journey
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_demo_and_the_cluster_that_it_started(alone: Here, number: signal.Signals) -> None:
    alone.env |= UNHURRIED
    process = alone.start("demo")
    _await_line(process, "quickstart training")
    record = local.status()
    assert record is not None
    process.send_signal(number)
    _await_line(process, "Stopped the Ray that was started.")
    assert process.wait(PATIENCE_S) == 128 + number
    assert local.status() is None and not any(is_running(started) for started in record.processes)


@pytest.mark.journey
def test_a_cluster_that_dies_ends_the_command_and_leaves_what_is_known(alone: Here) -> None:
    process = alone.start("run", alone.job("orphaned", train=JOB["train"] | {"max_steps": 100_000}))
    _await_line(process, "orphaned training")
    record = local.status()
    assert record is not None
    os.kill(record.head.pid, signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 69  # Ray itself would end the command after a minute, without a word
    assert "no cluster answers" in stderr and "status orphaned --storage" in stderr
    told = alone("status", "orphaned").stdout
    # Its members may have died, and the controller have seen it, a moment before the controller died too.
    assert re.search("orphaned: (training|recovering)", told) and "has not ended, according to its journal" in told
