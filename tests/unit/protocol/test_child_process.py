"""What is asked of a model and answered, as lines."""

import pytest

from orchestrator.errors import ProtocolError
from orchestrator.protocol.child_process import (
    MODEL_LINES,
    Answer,
    Evaluation,
    EvaluationResult,
    Fault,
    Generation,
    GenerationResult,
    Remark,
    Request,
    Split,
    TextPiece,
)


@pytest.mark.parametrize(
    "message",
    [
        Evaluation("/run", "/run/step", split=Split.TRAIN, corpus=None, max_rows=3),
        EvaluationResult(1, 2, 3.0, "pairs", metrics={"accuracy": 0.5}),
        Generation("/run", "/run/step", "two\nlines ü", 9, 0.5, None, 1.0, 7),
        GenerationResult("text", (1, 2), 3, True, 4.5),
        TextPiece("\n"),
        Remark("slow"),
        Fault("DataError", "a", "b", ""),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_is_one_line_and_survives_a_round_trip(message: Request | Answer) -> None:
    line = MODEL_LINES.write(message)
    assert "\n" not in line
    assert MODEL_LINES.read(line) == message


@pytest.mark.parametrize(
    "line", ["", "{}", "[1]", '{"kind": "Order", "value": {}}', '{"kind": "TextPiece", "value": {}}']
)
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(ProtocolError):
        MODEL_LINES.read(line)
