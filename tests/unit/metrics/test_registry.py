import re

import pytest

from orchestrator.errors import NotFound
from orchestrator.metrics.registry import DECLARED, METRICS, metric


def test_names_are_unique() -> None:
    assert len(METRICS) == len(DECLARED)


@pytest.mark.parametrize("name", [m.name for m in DECLARED])
def test_declaration_is_well_formed(name: str) -> None:
    declared = metric(name)
    assert re.fullmatch(r"[a-z]+/[a-z][a-z0-9]*(_[a-z0-9]+)*", name)
    assert declared.unit
    assert declared.meaning[0].islower() or declared.meaning.startswith("MaxVio")
    assert not declared.meaning.endswith(".")


@pytest.mark.parametrize(("unit", "suffix"), [("s", "_s"), ("bytes", "_bytes")])
def test_names_of_durations_and_sizes_end_in_the_unit(unit: str, suffix: str) -> None:
    for declared in DECLARED:
        assert declared.name.endswith(suffix) == (declared.unit == unit), declared.name


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(NotFound, match="Did you mean `train/loss`") as caught:
        metric("train/los")
    assert caught.value.exit_code == 102


def test_name_near_to_nothing_lists_all() -> None:
    with pytest.raises(NotFound, match="train/loss, .*moe/max_violation"):
        metric("zzz")


@pytest.mark.parametrize(
    ("name", "in_prometheus"),
    [
        ("train/loss", "orchestrator_train_loss"),
        ("train/tokens", "orchestrator_train_tokens_total"),
        ("perf/step_s", "orchestrator_perf_step_seconds"),
        ("comm/sent_bytes", "orchestrator_comm_sent_bytes_total"),
        ("elastic/generation", "orchestrator_elastic_generation"),
        ("elastic/recovery_stall_s", "orchestrator_elastic_recovery_stall_seconds_total"),
        ("system/cpu_percent", "orchestrator_system_cpu_ratio"),
        ("run/checkpoint_time", "orchestrator_run_checkpoint_timestamp_seconds"),
    ],
)
def test_names_in_prometheus_follow_its_conventions(name: str, in_prometheus: str) -> None:
    assert metric(name).prometheus == in_prometheus


def test_names_in_prometheus_are_valid_and_unique() -> None:
    names = [declared.prometheus for declared in DECLARED]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)


def test_shares_are_of_one_in_prometheus() -> None:
    assert metric("system/cpu_percent").factor == 0.01 and metric("system/memory_bytes").factor == 1.0
