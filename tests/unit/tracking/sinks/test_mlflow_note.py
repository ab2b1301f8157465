"""The end of a run in its description."""

from orchestrator.tracking.sinks.mlflow_note import with_outcome, without_outcome
from orchestrator.tracking.sinks.sink import Finish, MetricPoint, Outcome

NEWEST = {"train/loss": MetricPoint("train/loss", 2.5, 1499, 0.0)}
MOVES = {"rescales": 2, "recoveries": 1}


def test_an_end_replaces_the_one_before_it_and_text_of_users_stays() -> None:
    failed = with_outcome("mine", Finish(Outcome.FAILED, "lost:\n\nworker 3"), NEWEST, MOVES, "a.png")
    ended = "**Outcome:** failed after 1,500 steps, train loss 2.5000, rescales 2, recoveries 1: lost: worker 3"
    assert failed == f"mine\n\n{ended}\n![Loss and world size over steps](a.png)"
    edited = f"{failed}\n\nadded"
    assert without_outcome(edited) == "mine\n\nadded"
    newest = NEWEST | {"eval/loss": MetricPoint("eval/loss", 3.0, 1499, 0.0)}
    again = with_outcome(edited, Finish(Outcome.SUCCEEDED, ""), newest, MOVES, None)
    assert again.startswith("mine\n\nadded\n\n**Outcome:** succeeded") and again.count("**Outcome:**") == 1
    assert "validation loss 3.0000" in again


def test_a_run_without_description_and_steps_has_its_end_alone() -> None:
    note = with_outcome("", Finish(Outcome.STOPPED, ""), {}, {"rescales": 0}, None)
    assert note == "**Outcome:** stopped after 0 steps, rescales 0"
    assert without_outcome(note) == ""
