"""Calls to controllers that are there, or gone."""

import pytest

from orchestrator.cluster.remote import Remote
from orchestrator.controller.controller import RunController
from orchestrator.errors import ClusterUnreachable
from orchestrator.scheduler import controller_client
from orchestrator.scheduler.autoscaler import _apply
from orchestrator.scheduler.controller_client import ControllerClient, controlled_runs


def test_a_run_without_a_controller_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_client, "find", lambda name: None)
    assert ControllerClient("try").find() is None
    with pytest.raises(ClusterUnreachable, match="run try has no controller"):
        ControllerClient("try").ask(RunController.status)
    _apply("try", RunController.scale, 3)  # its run has ended meanwhile: the decision is dropped


def test_a_controller_is_found_by_its_runs_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_client, "find", {"try/controller": "a handle"}.get)
    assert ControllerClient("try", patience_s=2.0).find() == Remote("a handle", timeout_s=2.0)


def test_runs_with_a_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a/controller", "a/tracker", "b/worker/w0", "c/controller", "scheduler"]
    monkeypatch.setattr(controller_client, "actor_names", lambda: names)
    assert controlled_runs() == ["a", "c"]
