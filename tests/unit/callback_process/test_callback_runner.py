"""What callbacks do wrong ends no other callback, and costs none its state."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.callback import Scale
from orchestrator.callback_process import callback_runner
from orchestrator.callback_process.callback_position import Position, read_position, store_position
from orchestrator.callback_process.callback_runner import CallbackRunner
from orchestrator.protocol.events.base import JournalEntry, plain_of_entry
from orchestrator.protocol.events.training import StepsCommitted
from orchestrator.protocol.step_record import BatchRecord, StepRecord, StepTiming, UpdateRecord
from orchestrator.spec.job import JobSpec
from orchestrator.spec.own_callbacks import CallbackSpec
from orchestrator.storage.caller import call_here
from tests.support.recorded_run import write_journal

CODE = """
import os, sys
from pathlib import Path
from orchestrator.callback import Callback


class Counting(Callback):
    def __init__(self, options):
        self.options, self.seen = options, 0

    def on_step(self, step):
        self.seen += 1
        if step.step == self.options.get("leaves_at"):
            sys.exit(1)
        if step.step == self.options.get("raises_at"):
            raise ConnectionError(f"no answer to {os.environ['TOKEN']}")

    def on_end(self, outcome, reason):
        with Path(self.options["file"]).open("a") as file:
            file.write(f"{self.seen} {outcome}\\n")

    def state_dict(self):
        return {"seen": {self.seen} if self.options.get("keeps_a_set") else self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""
PATIENCE_S = 60.0
STEPS = 6


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CallbackRunner]:
    """Runs callbacks over a journal to the run's end."""
    monkeypatch.setattr(callback_runner, "signer_in_cluster", lambda _: None)
    monkeypatch.setattr(callback_runner, "READ_EVERY_S", 0.01)
    names = [f"callback{number}" for number in range(4)]
    (tmp_path / "counting.py").write_text(
        CODE + "".join(f"\n\ndef {n}(options): return Counting(options)" for n in names)
    )

    monkeypatch.setenv("TOKEN", "")
    (tmp_path / "token").write_text("opensesame")

    def made(*options: dict[str, object]) -> CallbackRunner:
        records = [
            StepRecord(n, 0, 1, 1.5, BatchRecord(10, n, 1), UpdateRecord(0.1, 1.0, applied=True), StepTiming(0.1, 0.0))
            for n in range(STEPS)
        ]
        events = [JournalEntry(n, 1, 0.0, StepsCommitted((record,))) for n, record in enumerate(records)]
        write_journal(tmp_path, [plain_of_entry(event) for event in events])
        specs = [
            CallbackSpec.model_validate(
                {
                    "entrypoint": f"counting:callback{number}",
                    "code_dir": str(tmp_path),
                    "options": {"file": str(tmp_path / f"{number}.txt"), **of_it},
                }
            )
            for number, of_it in enumerate(options)
        ]
        job = JobSpec(name="run", callbacks=specs, secrets={"TOKEN": f"file:{tmp_path / 'token'}"})
        runner = CallbackRunner("run", str(tmp_path), job, call_here)
        assert runner.finish("succeeded", "", PATIENCE_S)
        return runner

    return made


def test_a_callback_that_raises_keeps_its_state_and_others_continue(
    run: Callable[..., CallbackRunner], tmp_path: Path
) -> None:
    store_position(str(tmp_path), Position(1, 1, (("counting:callback0", {"seen": 12}),)))
    runner = run({"raises_at": 4}, {"leaves_at": 3}, {})
    why = "on_step of step 4 raised ConnectionError: no answer to ***"
    assert runner.warning() == f"the callback counting:callback0 is called no more: {why}"
    assert not (tmp_path / "0.txt").exists() and not (tmp_path / "1.txt").exists()
    assert (tmp_path / "2.txt").read_text() == "4 succeeded\n"
    position = read_position(str(tmp_path))
    assert (position.step, dict(position.states)) == (
        5,
        {"counting:callback0": {"seen": 12}, "counting:callback2": {"seen": 4}},
    )


def test_a_state_that_cannot_be_stored_ends_that_callback_only(
    run: Callable[..., CallbackRunner], tmp_path: Path
) -> None:
    runner = run({"keeps_a_set": True}, {})
    assert "state_dict raised TypeError: Object of type set is not JSON serializable" in runner.warning()
    assert (tmp_path / "1.txt").read_text() == f"{STEPS} succeeded\n"
    assert dict(read_position(str(tmp_path)).states) == {"counting:callback1": {"seen": STEPS}}


def test_the_end_is_called_once_however_often_storage_refuses(
    run: Callable[..., CallbackRunner], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def refuses(run_dir: str, position: Position) -> None:
        tries.append(position)
        if len(tries) < 4:
            raise OSError("no space left on device")
        store_position(run_dir, position)

    monkeypatch.setattr(callback_runner, "store_position", refuses)
    run({})
    assert len(tries) == 4 and (tmp_path / "0.txt").read_text() == f"{STEPS} succeeded\n"
    assert json.loads(next((tmp_path / "callbacks").iterdir()).read_text())["step"] == STEPS - 1


def test_a_request_with_another_type_is_refused_where_it_is_made() -> None:
    with pytest.raises(TypeError, match="Scale takes a number of workers, an int; got '3'"):
        Scale("3")  # type: ignore[arg-type]
