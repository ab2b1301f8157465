import re

import pytest

from orchestrator.errors import NotFound
from orchestrator.metrics import DECLARED, METRICS, metric


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
