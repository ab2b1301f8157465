"""Callbacks of runs on real Ray with simulated workers: each step in order, requests, kills, errors."""

import json
import os
import signal
from pathlib import Path

import pytest

from orchestrator.callback_process.callback_position import read_position
from orchestrator.cluster.actors import names_of
from orchestrator.protocol.status import RunPhase
from orchestrator.submission.resume_request import resume_request
from tests.support.control import PATIENCE_S, Cluster
from tests.support.hosts import until
from tests.support.simulated_services import simulated_parts

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.usefixtures("ray_cluster")]

CODE = '''
import json, os
from pathlib import Path
from orchestrator.callback import Callback, Pause, SaveCheckpoint, Scale, Stop


class Recorder(Callback):
    """Writes what it hears, and requests what its options have for a step."""

    def __init__(self, options):
        self.file, self.requests = Path(options["file"]), options["requests"]
        self.seen = 0

    def say(self, **what):
        with self.file.open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), **what}) + "\\n")

    def on_step(self, step):
        self.seen += 1
        self.say(step=step.step, loss=step.loss, workers=step.world_size, seen=self.seen)
        what, *values = self.requests.get(str(step.step), [None])
        return what and {"scale": Scale, "stop": Stop, "pause": Pause, "save": SaveCheckpoint}[what](*values)

    def on_end(self, outcome, reason):
        self.say(end=outcome, reason=reason)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Faulty(Callback):
    def on_step(self, step):
        raise ValueError(f"no step {step.step}")


def recorder(options):
    return Recorder(options)


def faulty(options):
    return Faulty()
'''


@pytest.fixture
def on(tmp_path: Path) -> Cluster:
    (tmp_path / "followers.py").write_text(CODE)
    return Cluster(tmp_path)


def _callback(tmp_path: Path, **requests: list[object]) -> dict[str, object]:
    options = {"file": str(tmp_path / "heard.jsonl"), "requests": {k.removeprefix("_"): v for k, v in requests.items()}}
    return {"entrypoint": "followers:recorder", "code_dir": str(tmp_path), "options": options}


def _written_lines(tmp_path: Path) -> list[dict[str, object]]:
    file = tmp_path / "heard.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_callbacks_have_every_step_once_and_their_requests_are_met(on: Cluster, tmp_path: Path) -> None:
    callbacks = [
        {"entrypoint": "followers:faulty", "code_dir": str(tmp_path)},
        _callback(tmp_path, _10=["scale", 3, "more"], _20=["scale", 9], _40=["save"], _90=["stop", "enough"]),
    ]
    train = {"max_steps": 1_000_000, "global_batch_size": 16, "micro_batch_size": 4}
    on.submit("heard", callbacks=callbacks, train=train, checkpoint={"every": 1000})
    status = on.until("heard", lambda s: "is called no more" in str(s.warning))
    why = "on_step of step 0 raised ValueError: no step 0"
    assert status.warning == f"the callback followers:faulty is called no more: {why}"
    on.until("heard", lambda s: s.workers_now == 3)
    saved = on.until("heard", lambda s: s.checkpoint_step is not None)
    assert 40 <= saved.checkpoint_step < 1_000_000
    ended = on.end_of("heard")
    assert ended.phase is RunPhase.STOPPED and ended.why.startswith("enough")
    *steps, end = _written_lines(tmp_path)
    assert [line["step"] for line in steps] == list(range(ended.step)) == [line["seen"] - 1 for line in steps]  # type: ignore[operator]
    assert {line["workers"] for line in steps} == {2, 3} and (end["end"], end["reason"]) == ("stopped", ended.why)
    log = (Path(ended.run_dir) / "logs" / "callbacks.log").read_text()
    assert "raise ValueError" in log and "Scale(workers=9" in log and "was refused" in log
    until(lambda: names_of("heard") == [], PATIENCE_S, "the end of its processes")


def test_a_replaced_process_continues_with_the_state_of_its_callbacks(on: Cluster, tmp_path: Path) -> None:
    train = {"max_steps": 1_000_000, "global_batch_size": 16, "micro_batch_size": 4}
    on.submit("killed", callbacks=[_callback(tmp_path, _5=["save"])], train=train, checkpoint={"every": 1000})
    until(lambda: read_position(str(tmp_path / "killed")).step >= 5, PATIENCE_S, "a stored position")
    until(lambda: len(_written_lines(tmp_path)) > 30, PATIENCE_S, "steps after it")
    (first,) = {line["pid"] for line in _written_lines(tmp_path)}
    os.kill(int(str(first)), signal.SIGKILL)
    until(lambda: len({line["pid"] for line in _written_lines(tmp_path)}) == 2, PATIENCE_S, "another process")
    on.ask("pause", "killed")
    paused = on.end_of("killed")
    lines = _written_lines(tmp_path)
    second = [line for line in lines if line["pid"] != first]
    assert second[-1]["end"] == "paused"
    steps = [line["step"] for line in second[:-1]]
    assert int(str(steps[0])) > 5 and steps == list(range(int(str(steps[0])), paused.step))
    assert all(line["seen"] == int(str(line["step"])) + 1 for line in lines if "step" in line)

    order = resume_request(Path(paused.run_dir), None, None, None, False)
    on.ask("resume", "killed", paused.run_dir, order, True, simulated_parts())
    on.until("killed", lambda s: s.step > paused.step + 20)
    on.ask("stop", "killed")
    ended = on.end_of("killed")
    third = _written_lines(tmp_path)[len(lines) :]
    assert [line.get("step") for line in third[:-1]] == list(range(paused.step, ended.step))
    assert third[-2]["seen"] == ended.step and third[-1]["end"] == "stopped"
