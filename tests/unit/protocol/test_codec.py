import json
from dataclasses import replace

import pytest

from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.world import World
from orchestrator.errors import ProtocolError
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.protocol.messages import (
    DesiredRunState,
    Directive,
    Fence,
    FinishMode,
    GenerationPlan,
    StateSource,
    StoreAddress,
)
from orchestrator.protocol.step_record import BatchRecord, StateRecord, StepRecord, StepTiming, UpdateRecord

PLAN = GenerationPlan(
    term=2,
    world=World(3, ("a", "b")),
    placement=ExpertPlacement.balanced(5, 2),
    source=StateSource(World(2, ("a",)), ExpertPlacement.balanced(5, 1), ("b",), 12),
    store_prefix="2/3",
    store_address=StoreAddress("10.0.0.1", 4321),
)
DIRECTIVE = Directive(term=2, seq=7, current=None, next=PLAN, fence=Fence(3, 12), finish=FinishMode.STOP)


def test_values_survive_json() -> None:
    assert from_plain(Directive, json.loads(json.dumps(to_plain(DIRECTIVE)))) == DIRECTIVE


def test_a_step_record_is_compact_and_survives_json() -> None:
    sparse = StepRecord(0, 0, 1, 4.0, BatchRecord(8, 0, 1), UpdateRecord(0.1, 1.0, applied=True), StepTiming(0.5, 9.0))
    assert to_plain(sparse) == {
        "step": 0,
        "generation": 0,
        "world_size": 1,
        "loss": 4.0,
        "batch": {"tokens": 8, "first_position": 0, "num_positions": 1},
        "update": {"lr": 0.1, "grad_norm": 1.0, "applied": True},
        "timing": {"step_s": 0.5, "vote_time": 9.0},
    }
    full = replace(sparse, validation_loss=0.0, state=StateRecord(("0a",), 8), timing=StepTiming(0.5, 9.0, slowest=0))
    for record in (sparse, full):
        assert from_plain(StepRecord, json.loads(json.dumps(to_plain(record)))) == record


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"seq": 1, "workers": 2, "speed": 3}, "DesiredRunState has no field speed"),
        ({"seq": 1}, "DesiredRunState can't be read"),
        ({"seq": "1", "workers": 2}, "DesiredRunState.seq is '1'; it must be int"),
        ({"seq": True, "workers": 2}, "DesiredRunState.seq is True"),
        ([], "DesiredRunState is"),
        ({"seq": 1, "workers": 2, "finish": "soon"}, "DesiredRunState.finish is 'soon'; it must be one of "),
    ],
    ids=["unknown", "missing", "type", "bool for int", "no object", "no such word"],
)
def test_what_does_not_fit_is_refused(plain: object, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        from_plain(DesiredRunState, plain)


def test_the_path_of_a_value_that_does_not_fit_is_named() -> None:
    plain = to_plain(DIRECTIVE)
    plain["next"]["world"]["members"][1] = 7
    with pytest.raises(ProtocolError, match=r"^Directive\.next\.world\.members\[1\] is 7; it must be str"):
        from_plain(Directive, plain)
    plain = to_plain(DIRECTIVE)
    plain["next"]["world"]["colour"] = "red"
    with pytest.raises(ProtocolError, match=r"^Directive\.next\.world has no field colour; "):
        from_plain(Directive, plain)


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    timing = from_plain(StepTiming, {"step_s": 2, "vote_time": 1.5})
    assert timing == StepTiming(2.0, 1.5) and isinstance(timing.step_s, float)
