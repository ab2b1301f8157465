"""The end of a run's description in MLflow: a paragraph below what the submission and users wrote there."""

import re
from collections.abc import Mapping

from orchestrator.tracking.sinks.sink import Finish, MetricPoint

_HEADING = "**Outcome:**"
_PARAGRAPH = re.compile(rf"(?:\A|\n\n){re.escape(_HEADING)}.*?(?=\n\n|\Z)", re.DOTALL)


def without_outcome(note: str) -> str:
    """The description without the paragraph of an earlier end: the run goes on."""
    return _PARAGRAPH.sub("", note)


def with_outcome(
    note: str, end: Finish, newest: Mapping[str, MetricPoint], moves: Mapping[str, int], picture: str | None
) -> str:
    """The description with a paragraph of this end, in place of that of an earlier one.

    Args:
        newest: the newest values of the run, by the metric's key.
        moves: numbers of changes of the members, by their kind.
        picture: address of a chart, relative to the pages of the server.
    """
    loss = newest.get("train/loss")
    parts = [f"{_HEADING} {end.outcome} after {loss.step + 1 if loss else 0:,} steps"]
    names = {"train/loss": "train loss", "eval/loss": "validation loss"}
    parts += [f"{name} {newest[key].value:.4f}" for key, name in names.items() if key in newest]
    parts += [f"{kind} {count}" for kind, count in moves.items()]
    text = ", ".join(parts)
    if end.reason:
        text += f": {' '.join(end.reason.split())}"  # without an empty line, which would end the paragraph
    if picture is not None:
        text += f"\n![Loss and world size over steps]({picture})"
    return "\n\n".join(filter(None, (without_outcome(note), text)))
