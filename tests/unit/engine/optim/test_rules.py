"""Update rules against references, with the same bits wherever partitions are cut, and in a replay."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.elastic.bucket_partition import PIECE_MULTIPLE
from orchestrator.elastic.recovery_point import Holding
from orchestrator.elastic.state_spec import EMA, OF_RULE, ParamSpec
from orchestrator.engine.optim.all_rules import RULES
from orchestrator.engine.optim.muon import orthogonal
from orchestrator.engine.optim.replayer import Replayer
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.engine.optim.stepper import ParamPart, Stepper, Updates, places
from orchestrator.spec.optimizer import OF_MATRICES
from orchestrator.spec.pruning import PruningSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Snapshot, Update
from tests.support import devices
from tests.support.reference_rules import REFERENCES, TORCH_MUON

pytestmark = pytest.mark.usefixtures("device")

NUMEL = 64 * PIECE_MULTIPLE
LR, STEPS = 3e-3, 50
ELEMENTWISE = [name for name in RULES if name not in OF_MATRICES]


def _train(rule: str, **more: object) -> TrainSpec:
    optimizer = {"name": rule, "weight_decay": 0.1, **more}
    return TrainSpec.model_validate({"optimizer": optimizer, "ema": {"decay": 0.9}})


def _param(train: TrainSpec, name: str, *shape: int, blocks: int = 1) -> ParamSpec:
    return ParamSpec(name, shape, None, blocks).with_settings(train)


def _drawn(numel: int, count: int) -> tuple[Tensor, list[Tensor]]:
    """Values, and gradients of some steps."""
    generator, device = torch.Generator().manual_seed(3), devices.device()
    values = torch.randn(numel, generator=generator).to(device)
    return values, [(torch.randn(numel, generator=generator) * 10.0 ** -(n % 3)).to(device) for n in range(count)]


def _zeros(train: TrainSpec, like: Tensor, parts: Sequence[ParamPart]) -> dict[str, Tensor]:
    """State of a partition before the first update."""
    state = Stepper([{"params": [like], "update": parts[0].param.update}], train)
    state.parts[id(like)] = parts
    return {kind: tensor.zero_() for kind, tensor in state.empty_state(0, like).items()}


def _ours(rule: str, values: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """A matrix after updates by all gradients."""
    train, device = _train(rule), devices.device()
    ours = values.reshape(-1).to(device, copy=True)
    parts = [ParamPart(_param(train, "a.query", *values.shape), slice(0, len(ours)))]
    state = _zeros(train, ours, parts)
    for number, gradient in enumerate(gradients, 1):
        Updates(train).apply(parts, ours, gradient.reshape(-1).to(device), state, UpdateInfo(number, LR))
    return ours.cpu().view(values.shape)


@pytest.mark.parametrize("shape", [(48,), (), (3, 8, 16), (2, 3, 4, 8)], ids=str)
def test_adafactor_updates_every_shape_as_torch_does(shape: tuple[int, ...]) -> None:
    values, gradients = _drawn(math.prod(shape), STEPS)
    values, gradients = values.cpu().view(shape), [gradient.cpu().view(shape) for gradient in gradients]
    wanted = REFERENCES["adafactor"](values, gradients, LR, 0.1 if len(shape) > 1 else 0.0)
    torch.testing.assert_close(_ours("adafactor", values, gradients), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(24, 16), (16, 40), (16, 16)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_weights_are_those_of_the_reference(rule: str, shape: tuple[int, int]) -> None:
    values, gradients = _drawn(shape[0] * shape[1], STEPS)
    values, gradients = values.cpu().view(shape), [gradient.cpu().view(shape) for gradient in gradients]
    ours, wanted = _ours(rule, values, gradients), REFERENCES[rule](values, gradients, LR, 0.1)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    if rule == "muon":
        moved = (wanted - values).norm()
        assert (ours - TORCH_MUON(values, gradients, LR, 0.1)).norm() < 0.03 * moved


def test_an_orthogonal_matrix_has_singular_values_near_one() -> None:
    matrix = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).to(devices.device())
    found = torch.linalg.svdvals(orthogonal(matrix).cpu())
    assert float(found.min()) > 0.6 and float(found.max()) < 1.3


@pytest.mark.parametrize("rule", OF_MATRICES)
def test_stacked_matrices_are_updated_each_for_itself(rule: str) -> None:
    train = _train(rule)
    values, gradients = _drawn(2 * 12 * 16, 3)
    stacked, halves = values.clone(), [values[:192].clone(), values[192:].clone()]
    both = [ParamPart(_param(train, "mlp.gate_up", 24, 16, blocks=2), slice(0, 384))]
    one = [ParamPart(_param(train, "mlp.query", 12, 16), slice(0, 192))]
    state, own = _zeros(train, stacked, both), [_zeros(train, half, one) for half in halves]
    for number, gradient in enumerate(gradients, 1):
        at = UpdateInfo(number, LR)
        Updates(train).apply(both, stacked, gradient, state, at)
        for half, kept, part in zip(halves, own, gradient.split(192), strict=True):
            Updates(train).apply(one, half, part, kept, at)
    assert torch.equal(stacked, torch.cat(halves))


# -- bits ------------------------------------------------------------------------------------------------------------


def _updated(rule: str, values: Tensor, gradients: Sequence[Tensor], cuts: Sequence[int]) -> dict[str, Tensor]:
    """After several steps for the pieces between the cuts, each in memory of its own. The first 100 elements, and some
    at the end, are of parameters without weight decay."""
    train = _train(rule)
    layout = [(_param(train, "norm", 100), 0, 100), (_param(train, "query", 25, 32), 100, 900)]
    layout.append((_param(train, "bias", NUMEL - 900), 900, NUMEL))
    found: dict[str, list[Tensor]] = {}
    for start, stop in pairwise([0, *cuts, len(values)]):
        master = values[start:stop].clone()
        spans = [(param, max(low, start), min(high, stop)) for param, low, high in layout]
        parts = [ParamPart(param, slice(low - start, high - start)) for param, low, high in spans if low < high]
        state = _zeros(train, master, parts)
        for number, gradient in enumerate(gradients, 1):
            Updates(train).apply(parts, master, gradient[start:stop].clone(), state, UpdateInfo(number, LR))
        for kind, part in {"weights": master, **state}.items():
            found.setdefault(kind, []).append(part)
    return {kind: torch.cat(parts) for kind, parts in found.items()}


@pytest.mark.parametrize("rule", ELEMENTWISE)
@given(cuts=st.sets(st.integers(1, NUMEL // PIECE_MULTIPLE - 1), max_size=6))
@settings(max_examples=30, deadline=None)
def test_updates_have_the_same_bits_wherever_partitions_are_cut(rule: str, cuts: set[int]) -> None:
    values, gradients = _drawn(NUMEL, 3)
    whole = _updated(rule, values, gradients, [])
    pieces = _updated(rule, values, gradients, sorted(cut * PIECE_MULTIPLE for cut in cuts))
    assert [kind for kind in whole if not torch.equal(whole[kind], pieces[kind])] == []
    assert EMA in whole and not torch.equal(whole[EMA], torch.zeros_like(values))


@pytest.mark.on_cpu
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no vectors here")
def test_a_piece_that_fills_no_vectors_would_have_others() -> None:
    """Else partitions needn't be multiples of anything."""
    values, gradients = _drawn(NUMEL, 3)
    whole = _updated("adamw", values, gradients, [])
    ragged = _updated("adamw", values, gradients, list(range(PIECE_MULTIPLE + 7, NUMEL, PIECE_MULTIPLE + 7)))
    assert any(not torch.equal(whole[kind], ragged[kind]) for kind in whole)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_a_replay_has_the_bits_of_the_updates(rule: str, mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.engine.optim.replayer.PIECE", 256)  # several pieces
    train = _train(rule, groups=[{"params": ["*key"], "lr_scale": 0.5}])
    params = [
        ParamSpec("norm", (48,), None),
        ParamSpec("a.query", (24, 16), None),
        ParamSpec("a.gate_up", (32, 16), None, 2),
        ParamSpec("a.key", (16, 24), None),
    ]
    by_update: dict[tuple[str, float], list[ParamSpec]] = {}
    for param in (param.with_settings(train) for param in params):
        by_update.setdefault(param.update, []).append(param)
    live, before, deltas = NamedRanges(), NamedRanges(), [NamedRanges() for _ in range(3)]
    for same in by_update.values():
        numel = sum(param.numel for param in same)
        values, gradients = _drawn(numel, 3)
        padding = -numel % PIECE_MULTIPLE
        master, grads = (torch.nn.functional.pad(t, (0, padding)) for t in (values, torch.stack(gradients)))
        parts, end = list[ParamPart](), 0
        for param in same:
            parts.append(ParamPart(param, slice(end, end + param.numel)))
            end += param.numel
        state = _zeros(train, master, parts)
        named = {"master" if mixed else "param": master, **state}
        for ranges in (before, live):
            for kind, tensor in named.items():
                for part, here in zip(parts, places(kind, parts), strict=True):
                    data = tensor[here]
                    ranges.add(f"{kind}/{part.param.name}", 0, data.cpu().clone() if ranges is before else data)
        for part in parts if mixed else ():
            for ranges in (before, live):
                rounded = master[part.here].bfloat16()
                ranges.add(f"param/{part.param.name}", 0, rounded.cpu() if ranges is before else rounded)
        for number, delta in enumerate(deltas):
            Updates(train).apply(parts, master, grads[number], state, UpdateInfo(number + 5, LR / (number + 1)))
            for part in parts:
                delta.add(f"grad/{part.param.name}", 0, grads[number][part.here].cpu())
                if mixed:
                    live.view(f"param/{part.param.name}", 0, part.param.numel).copy_(master[part.here])
    kept = [
        Snapshot(Holding(0, n, 0), "", torch.empty(0), delta, Update(n + 5, LR / (n + 1)))
        for n, delta in enumerate(deltas)
    ]
    Replayer(train, params, devices.device())(before, kept)
    for name, held in live:
        assert torch.equal(before.view(name, held.start, held.stop), held.data.cpu()), name
    kinds = {name.partition("/")[0] for name in live.names()}
    assert kinds == {*OF_RULE[rule], *OF_RULE["adamw" if rule == "muon" else rule], EMA, "param"} | (
        {"master"} if mixed else set()
    )


@pytest.mark.parametrize("rule", RULES)
def test_what_is_pruned_stays_zero_in_weights_and_their_average(rule: str) -> None:
    pruning = {"targets": [{"pattern": "unstructured"}], "start_step": 1, "end_step": 2, "every": 1}
    train = _train(rule).model_copy(update={"pruning": PruningSpec.model_validate(pruning)})
    values, gradients = _drawn(16 * 16, 5)
    parts = [ParamPart(_param(train, "a.query", 16, 16), slice(0, 256))]
    state, is_pruned = _zeros(train, values, parts), torch.arange(256, device=values.device) % 3 == 0
    updates = Updates(train)
    for number, gradient in enumerate(gradients, 1):
        if number == 2:
            with pytest.raises(ValueError, match="update 2 prunes"):
                updates.apply(parts, values, gradient, state, UpdateInfo(number, LR))
        updates.apply(parts, values, gradient, state, UpdateInfo(number, LR), lambda _: is_pruned)
        for tensor in (values, state[EMA]):
            assert torch.equal(tensor == 0, is_pruned) or number == 1
    assert not (values == 0).all()
