"""A child process that answers by a pipe of its own."""

from pathlib import Path

import pytest

from orchestrator.errors import EntrypointError, OrchestratorError, UsageError
from orchestrator.protocol.child_process import Fault, Lines, Remark, TextPiece
from orchestrator.torch_process import TorchProcess

LINES = Lines(TextPiece, Remark, Fault)
CHILD = """
import os, sys
from orchestrator.errors import UsageError
from orchestrator.protocol.child_process import Fault, Lines, Remark, TextPiece, answering

with answering(Lines(TextPiece, Remark, Fault)) as (message, send):
    print("printed by a model")
    send(Remark(message.text + os.environ["MORE"]))
    send(Fault.of(UsageError("a secret", remedy="none"), lambda text: text.replace("secret", "***")))
os._exit(3)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "a_child"


def test_answers_come_apart_from_what_is_printed(child: str) -> None:
    with TorchProcess(child, LINES, {"MORE": "!"}) as process:
        process.send(TextPiece("hello"))
        answers = list(process.answers())
        assert answers == [Remark("hello!"), Fault("UsageError", "a ***", "none", "")]
        assert process.exit_code() == 3 and process.output() == "printed by a model"


def test_a_process_ends_with_its_block(child: str) -> None:
    with TorchProcess(child, LINES) as process:
        assert process.exit_code(0.0) is None  # it waits for its message
    assert process.exit_code() == -9


@pytest.mark.parametrize("cls", [UsageError, EntrypointError], ids=lambda cls: cls.__name__)
def test_an_error_crosses_the_border(cls: type[OrchestratorError]) -> None:
    error = cls("what", remedy="how", unchanged="nothing")
    again = Fault.of(error).error()
    assert type(again) is cls and (again.message, again.remedy, again.unchanged) == ("what", "how", "nothing")
