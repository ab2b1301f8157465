"""What a run that goes on accepts as the data that it has trained on."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.cluster.inbox import Inbox
from orchestrator.cluster.storage_thread import StorageThread
from orchestrator.controller.services.actor_classes import ActorClasses
from orchestrator.controller.services.run_services import RunServices
from orchestrator.run_records.prepared_data import PreparedData
from orchestrator.spec.job import JobSpec

KNOWN = PreparedData("/old/store-abc", 300, "/run/tokenizer.json")


@pytest.fixture
def services(tmp_path: Path) -> RunServices:
    made = RunServices("run", tmp_path, JobSpec(name="run"), ActorClasses(), 1, StorageThread(Inbox()), Inbox())
    made._known_data = KNOWN
    return made


def test_a_lost_store_may_be_restarted_on_another_node(services: RunServices) -> None:
    again = replace(KNOWN, store_dir="/new/store-abc")
    services._prepared(again)
    assert services.data == again and services.faults == ()


def test_another_corpus_is_a_fault(services: RunServices) -> None:
    services._prepared(replace(KNOWN, store_dir="/old/store-xyz"))
    assert services.data is None
    assert "/old/store-abc" in services.faults[0]
