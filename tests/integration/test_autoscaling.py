"""The Scheduler finds sizes of runs on real Ray, with simulated workers: room that comes and goes, stages, demand."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
from ray.experimental import internal_kv
from ray.util.placement_group import placement_group, remove_placement_group

from orchestrator.errors import UsageError
from orchestrator.protocol.status import RunPhase
from tests.support.control import Cluster
from tests.support.hosts import until
from tests.support.simulated_services import hurry

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SOON_S = 60.0


@pytest.fixture
def on(tmp_path: Path) -> Cluster:
    """Once Ray has counted in what earlier runs had."""
    until(lambda: ray.available_resources().get("CPU") == 4.0, SOON_S, "all processors to be free")
    return Cluster(tmp_path)


def _job(policy: str, **changes: Any) -> dict[str, Any]:
    """Workers of a whole processor each, of which there are four."""
    return {
        "workers": {"min": 1, "max": 4, "initial": 1},
        "resources": {"cpus": 1},
        "autoscale": {"policy": policy, "cooldown_s": 0},
        "train": {"max_steps": 100_000, "global_batch_size": 16, "micro_batch_size": 4},
        **changes,
    }


def _demand() -> int:
    """For how many workers Ray's autoscaler is asked to have room."""
    asked = internal_kv._internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
    return len(json.loads(asked)) if asked else 0


def _whys(on: Cluster, name: str) -> list[str]:
    return [event["why"] for event in on.ask("events", name) if event["kind"] == "target"]


@pytest.mark.journey
def test_a_run_uses_what_is_free_gives_it_back_and_obeys_its_user(on: Cluster) -> None:
    on.submit("free", **_job("available"))
    on.until("free", lambda s: s.workers_now == 4)
    assert _whys(on, "free") == ["there is room for 4"]
    on.ask("scale", "free", 1)
    on.until("free", lambda s: s.workers_now == 1)
    step = on.status("free").step
    status = on.until("free", lambda s: s.step > step + 15)  # some seconds, in which it isn't made larger again
    assert (status.workers_now, status.workers_wanted) == (1, 1)

    other = placement_group([{"CPU": 2.0}], name="somebody-elses")
    ray.get(other.ready(), timeout=SOON_S)
    on.ask("scale", "free", None)
    on.until("free", lambda s: s.workers_now == 2)
    remove_placement_group(other)
    on.until("free", lambda s: s.workers_now == 4)
    until(lambda: _demand() == 4, SOON_S, "Ray's autoscaler to be asked for all four")
    on.ask("stop", "free")
    status = on.end_of("free")
    assert status.phase is RunPhase.STOPPED and not status.recoveries
    on.assert_every_step_once("free", status.step)
    until(lambda: _demand() == 0, SOON_S, "Ray's autoscaler to be asked for nothing any more")


@pytest.mark.journey
def test_a_lost_place_is_not_waited_for(on: Cluster) -> None:
    """A worker is lost and another process takes its place: the run requests no more than there is room for, until that
    ends."""
    # Five of these steps come before a replacement is asked for: by then Ray has given the place away.
    on.submit("squeezed", **_job("available", envs={"SIM_STEP_S": "0.5"}))
    on.until("squeezed", lambda s: s.workers_now == 4)
    other = placement_group([{"CPU": 1.0}], name="in-its-place")  # waits for the first place that gets free
    on.ask("kill_worker", "squeezed")
    ray.get(other.ready(), timeout=SOON_S)
    on.until("squeezed", lambda s: s.workers_now == s.workers_wanted == 3)
    remove_placement_group(other)
    on.until("squeezed", lambda s: s.workers_now == 4)
    on.ask("stop", "squeezed")
    on.assert_every_step_once("squeezed", on.end_of("squeezed").step)


@pytest.mark.journey
def test_stages_name_their_workers_and_ray_is_asked_for_nodes(on: Cluster) -> None:
    stages = [
        {"name": "few", "workers": 1, "until": {"steps": 50}},
        {"name": "many", "workers": "2..6", "until": {"steps": 600}},
        {"name": "some", "workers": 2},
    ]
    workers = {"min": 1, "max": 6, "initial": 1}
    job = _job("stage", workers=workers, curriculum={"signal": "length", "stages": stages})
    job["envs"] = {"SIM_STEP_S": "0.1", "SIM_STAGES": json.dumps({"few": 0, "many": 50, "some": 650})}
    on.submit("staged", **job)
    on.until("staged", lambda s: s.workers_now == 4)  # as many as there is room for
    until(lambda: _demand() == 6, SOON_S, "Ray's autoscaler to be asked for the other two")
    hurry(on.storage / "staged")
    on.until("staged", lambda s: s.stage == "some" and s.workers_now == 2)
    until(lambda: _demand() == 2, SOON_S, "Ray's autoscaler to be asked for less")
    on.ask("stop", "staged")
    on.assert_every_step_once("staged", on.end_of("staged").step)
    assert set(on.sizes("staged")[:50]) == {1}


def test_automatic_sizes_need_a_policy_in_the_job(on: Cluster) -> None:
    on.submit("by-hand", **_job("manual"))
    on.until("by-hand", lambda s: s.step > 0)
    with pytest.raises(UsageError, match=r"its job's autoscale\.policy is manual"):
        on.ask("scale", "by-hand", None)
    assert on.status("by-hand").workers_now == 1
    on.ask("stop", "by-hand")
    on.end_of("by-hand")
