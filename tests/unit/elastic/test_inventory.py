"""The inventory of the state: its entries, and that a tensor added to it is moved, kept, saved and restored."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orchestrator.checkpoint.hf.shapes import listed
from orchestrator.elastic.expert_change import ExpertSet
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.elastic.inventory import inventory
from orchestrator.elastic.snapshot_layout import SnapshotFormat
from orchestrator.elastic.state_layout import StateLayout, training_layout
from orchestrator.elastic.state_spec import Absent, Inventory, Origin, ParamSpec, Sharing, StateTensor, saved_shapes
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.elastic.world import World
from orchestrator.errors import CheckpointCorrupt, UsageError
from orchestrator.policy.state.run_state import Commit
from orchestrator.protocol.messages import Restore
from orchestrator.protocol.worker_report import ShardWritten
from orchestrator.run_records.checkpoints.completion import commit_checkpoint
from orchestrator.spec.communication import CommunicationSpec, CompressionSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.pretrained.lora import LoraSpec
from orchestrator.spec.train import TrainSpec
from orchestrator.state.fingerprint import StateFingerprint
from orchestrator.state.ranges import NamedRanges, zeros_like
from orchestrator.worker.shard.shard import TrainingProgress
from orchestrator.worker.transition.load_state import read_state
from orchestrator.worker.transition.save_shard import ShardSaver
from tests.support.layouts import PLAIN, state_of
from tests.unit.elastic.layouts import execute, fill

PARAMS = [ParamSpec("head", (40, 3), None), *(ParamSpec(f"experts.{e}.up", (7, 5), e) for e in range(3))]
MATRIX, NORM = ParamSpec("query", (64, 32), None), ParamSpec("norm", (64,), None)
BUFFERS = [("bias", (5,))]
WEIGHTS = {"param": "REPLICATED float32", "exp_avg": "SHARDED float32", "exp_avg_sq": "SHARDED float32"}
MIXED = {**WEIGHTS, "param": "REPLICATED bfloat16", "master": "SHARDED float32"}


def test_weights_beside_adapters_are_in_no_checkpoint_snapshot_or_transfer() -> None:
    """Each rank reads its own from `model.init_from`; whatever else is trained is treated as ever."""
    spec = ModelSpec(
        init_from="/base",
        hidden_size=16,
        num_hidden_layers=2,
        n_routed_experts=3,
        lora=LoraSpec(r=2, target_modules=("q_proj", "down_proj")),
    )
    train = TrainSpec(trainable=("*.lora.*", "head"))
    params, buffers = listed(spec, 50)
    tensors = inventory(params, JobSpec(name="adapters", model=spec, train=train), buffers)
    trained = {p.name for p in params if ".lora." in p.name or p.name == "head"}
    assert {name for name, tensor in tensors.items() if tensor.is_base} == {
        f"param/{p.name}" for p in params if p.name not in trained
    }
    kinds = ("master", "exp_avg", "exp_avg_sq")
    wanted = {f"{kind}/{name}" for kind in kinds for name in trained} | {f"buffer/{name}" for name, _ in buffers}
    assert saved_shapes(tensors).keys() == wanted
    before, after = (
        training_layout(tensors, ExpertPlacement.balanced(3, len(members)), World(generation, members), PLAIN)
        for generation, members in enumerate((("a", "b"), ("a", "b", "c")))
    )
    plan = TransferPlan.between(before, after)
    moved = {plan.names[tensor] for tensor in plan.moves[:, 0].tolist()}
    kept = {plan.names[tensor] for tensor in plan.keeps[:, 0].tolist()}
    assert moved >= {"param/head", "param/layers.0.attention.lora.query.A"}
    assert not any(tensors[name].is_base for name in moved | kept)
    for rank in range(3):
        assert not any(tensors[name].is_base for name in SnapshotFormat.of(after, rank).names)
        held = [after.names[tensor] for tensor, *_ in after.ranges_of("abc"[rank]).tolist()]
        assert "param/layers.0.attention.query" in held  # it is in the rank's memory, and counted there


@pytest.mark.parametrize(
    ("trainable", "wrong"),
    [
        (("head",), "has none of the adapters of model.lora"),
        (("*",), "has matrices that adapters stand for, layers.0.attention.query, layers.1.attention.query"),
        (("*.lora.*", "layers.1.*"), "has matrices that adapters stand for, layers.1.attention.query"),
    ],
)
def test_what_is_trained_beside_adapters(trainable: tuple[str, ...], wrong: str) -> None:
    spec = ModelSpec(init_from="/base", num_hidden_layers=2, lora=LoraSpec(target_modules=("q_proj",)))
    params, buffers = listed(spec, 50)
    with pytest.raises(UsageError) as caught:
        inventory(params, JobSpec(name="adapters", model=spec, train=TrainSpec(trainable=trainable)), buffers)
    assert wrong in caught.value.message
    some = TrainSpec(trainable=("layers.1.*.lora.*", "*norm*"))  # those of one layer, and norms
    assert inventory(params, JobSpec(name="adapters", model=spec, train=some), buffers)


@pytest.mark.parametrize(
    ("mixed", "compression", "wanted", "kept"),
    [
        (False, {}, WEIGHTS, {}),
        (True, {}, MIXED, {}),
        (False, {"scheme": "topk"}, WEIGHTS, {"residual": (64, 32)}),
        (True, {"scheme": "topk", "momentum": 0.9}, MIXED, {"residual": (64, 32), "velocity": (64, 32)}),
        (False, {"scheme": "powersgd", "share": 0.1}, WEIGHTS, {"residual": (64, 32), "powersgd": (32, 1)}),
    ],
    ids=str,
)
def test_the_tensors_of_a_jobs_state(
    mixed: bool, compression: dict[str, Any], wanted: dict[str, str], kept: dict[str, tuple[int, ...]]
) -> None:
    communication = CommunicationSpec(compression=CompressionSpec(**compression))
    tensors = state_of([MATRIX, NORM], mixed, BUFFERS, communication)
    found = {name: f"{tensor.sharing.name} {tensor.dtype}" for name, tensor in tensors.items() if tensor.like}
    assert found == {f"{kind}/{p.name}": value for kind, value in wanted.items() for p in (MATRIX, NORM)}
    assert {n: t.shape for n, t in tensors.items() if t.absent is Absent.FIRST} == {
        f"{kind}/query": shape for kind, shape in kept.items()
    }
    in_checkpoints = [f"{kind}/{p.name}" for kind in ("master", "exp_avg", "exp_avg_sq") for p in (MATRIX, NORM)]
    assert saved_shapes(tensors).keys() == {*in_checkpoints, "buffer/bias"}
    assert not any(tensor.is_copy and tensor.stored not in tensors for tensor in tensors.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_trained_has_weights_alone_and_is_in_whole_snapshots_alone(precision: str) -> None:
    train = TrainSpec.model_validate({"precision": precision, "trainable": ["head"], "ema": {"decay": 0.9}})
    job = JobSpec(name="frozen").model_copy(update={"train": train})
    tensors = inventory(PARAMS, job, BUFFERS)
    kinds = {
        name: {n.partition("/")[0] for n in tensors if n.endswith(f"/{name}")} for name in ("head", PARAMS[1].name)
    }
    assert kinds == {
        "head": {"param", "master", "exp_avg", "exp_avg_sq", "ema"},
        "experts.0.up": {"param"},
    }
    assert saved_shapes(tensors)["master/experts.0.up"] == (7, 5)
    layout = training_layout(tensors, ExpertPlacement.balanced(3, 2), World(0, ("a", "b")), PLAIN)
    for rank in range(2):
        holds = "param/experts.0.up" in [layout.names[t] for t, *_ in layout.ranges_of("ab"[rank]).tolist()]
        assert ("param/experts.0.up" in SnapshotFormat.of(layout, rank).names) == holds
        assert not {n for n in SnapshotFormat.of_delta(layout, rank).names if n.endswith("experts.0.up")}
        assert "experts.0.up" not in layout.updates_of(rank)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"trainable": ["head", "heads*"]}, "train.trainable: heads[*] fits none of the model's 4 parameters"),
        ({"optimizer": {"groups": [{"params": ["heads"]}]}}, "train.optimizer.groups: heads fits none"),
        ({"trainable": ["head"], "optimizer": {"groups": [{"params": ["*up"]}]}}, "groups: [*]up fits none"),
    ],
)
def test_patterns_that_fit_nothing_are_refused(train: dict[str, Any], message: str) -> None:
    job = JobSpec(name="frozen").model_copy(update={"train": TrainSpec.model_validate(train)})
    with pytest.raises(UsageError, match=message) as refused:
        inventory(PARAMS, job, BUFFERS)
    assert "named as head and experts.2.up" in refused.value.remedy


def test_a_group_that_gives_muon_none_of_its_matrices_is_refused() -> None:
    params = [*PARAMS, MATRIX, NORM, ParamSpec("mlp.gate.weight", (4, 8), None)]
    for patterns, left in (["head", "nor*"], "head, nor[*]"), (["*.gate.*"], "[*].gate.[*]"), (["n*", "*"], "n[*]"):
        groups = {"optimizer": {"groups": [{"params": patterns, "name": "muon"}]}}
        job = JobSpec(name="muon").model_copy(update={"train": TrainSpec.model_validate(groups)})
        with pytest.raises(UsageError, match=f"groups: {left} is given to muon"):
            inventory(params, job, BUFFERS)
    groups = {"optimizer": {"groups": [{"params": ["*"], "name": "muon"}]}}
    found = inventory(params, JobSpec(name="muon").model_copy(update={"train": TrainSpec.model_validate(groups)}), [])
    assert {"momentum_buffer/query", "exp_avg/head", "exp_avg/norm", "exp_avg/mlp.gate.weight"} <= found.keys()


def test_some_experts_of_a_layer_are_not_trained_alone() -> None:
    params = [ParamSpec(f"layers.1.mlp.experts.{e}.{part}", (4, 4), e) for e in range(3) for part in ("down", "up")]
    for trainable, is_refused in (["*.down"], False), (["*.experts.1.down"], True), (["*.experts.*"], False):
        job = JobSpec(name="frozen").model_copy(update={"train": TrainSpec(trainable=tuple(trainable))})
        if is_refused:
            with pytest.raises(UsageError, match=r"some of the experts' layers.1.mlp.experts.\*.down"):
                inventory(params, job, BUFFERS)
        else:
            inventory(params, job, BUFFERS)


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="w has 0 elements"):
        ParamSpec("w", (0, 3), None)
    with pytest.raises(ValueError, match=r"\['param/w'"):
        state_of([ParamSpec("w", (1,), None)] * 2, False, [])
    for like in (None, NORM):
        with pytest.raises(ValueError, match="ema/query of 2048 elements is sharded like"):
            StateTensor("ema/query", (64, 32), Sharing.SHARDED, Origin.COPY, like)


# -- A kind that no code knows: an average of the weights, cut as their updates are ------------------------------------


def _with_average(origin: Origin, absent: Absent = Absent.REFUSE) -> dict[str, StateTensor]:
    average = [StateTensor(f"ema/{p.name}", p.shape, Sharing.SHARDED, origin, p, absent=absent) for p in PARAMS]
    return state_of(PARAMS, True, BUFFERS) | {tensor.name: tensor for tensor in average}


def _layout(tensors: Inventory, generation: int, members: str) -> StateLayout:
    return training_layout(tensors, ExpertPlacement.balanced(3, len(members)), World(generation, tuple(members)), PLAIN)


def _values(tensors: Inventory) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.randn(tensor.numel, generator=generator) for name, tensor in tensors.items()}
    copies = {n: values[t.stored].to(getattr(torch, t.dtype)) for n, t in tensors.items() if t.is_copy}
    return values | copies


def _held(layout: StateLayout, rank: int, values: Mapping[str, Tensor]) -> NamedRanges:
    ranges = NamedRanges()
    for tensor, start, stop in layout.ranges_of(layout.world.members[rank]).tolist():
        name = layout.names[tensor]
        ranges.add(name, start, values[name][start:stop].clone())
    return ranges


@pytest.mark.parametrize("origin", [Origin.UPDATE, Origin.COPY])
def test_an_added_tensor_is_cut_and_moved(origin: Origin) -> None:
    old, new = (_layout(_with_average(origin), *world) for world in ((0, "abc"), (1, "bd")))
    for layout in (old, new):
        for rank, worker in enumerate(layout.world.members):
            held = [(layout.names[t], start, stop) for t, start, stop in layout.ranges_of(worker).tolist()]
            average = {name.removeprefix("ema/"): span for name, *span in held if name.startswith("ema/")}
            assert average == {name: list(span) for name, span in layout.updates_of(rank).items()}
    after, wanted = execute(TransferPlan.between(old, new), fill(old), old.numel), fill(new)
    assert all(
        np.array_equal(after[worker][tensor], values, equal_nan=True)
        for worker, tensors in wanted.items()
        for tensor, values in tensors.items()
    )


@pytest.mark.parametrize("origin", [Origin.UPDATE, Origin.COPY])
def test_an_added_tensor_is_in_every_snapshot_unless_updates_make_it(origin: Origin) -> None:
    layout = _layout(_with_average(origin), 0, "abc")
    for rank, worker in enumerate(layout.world.members):
        held = [(layout.names[t], start, stop) for t, start, stop in layout.ranges_of(worker).tolist()]
        average = sorted(row for row in held if row[0].startswith("ema/"))
        forms = {SnapshotFormat.of(layout, rank): True, SnapshotFormat.of_delta(layout, rank): origin is Origin.COPY}
        for form, is_in in forms.items():
            shared = list(zip(form.names, form.start.tolist(), form.stop.tolist(), strict=True))[: form.num_shared]
            assert sorted(row for row in shared if row[0].startswith("ema/")) == (average if is_in else [])


def test_an_added_tensor_is_in_the_fingerprint() -> None:
    layout = _layout(_with_average(Origin.UPDATE), 0, "abc")
    for rank in range(3):
        ranges = _held(layout, rank, _values(layout.tensors))
        before = StateFingerprint(ranges, layout).look()
        next(held for name, held in ranges if name.startswith("ema/")).data.view(torch.int32)[0] ^= 1
        assert (StateFingerprint(ranges, layout).look() != before).nonzero()[0].tolist() == [rank]


def _saved(layout: StateLayout, values: Mapping[str, Tensor], run_dir: Path) -> Restore:
    """A checkpoint that all ranks of the layout wrote."""
    written: list[ShardWritten] = []
    for rank in range(layout.world.size):
        saver = ShardSaver(
            run_dir / "checkpoints", lambda _: layout.tensors, "", "", written.append, pytest.fail, pytest.fail
        )
        ranges = _held(layout, rank, values)
        engine = SimpleNamespace(ranges=lambda ranges=ranges: ranges)
        groups = SimpleNamespace(placement=ExpertPlacement.balanced(3, layout.world.size))
        shard: Any = SimpleNamespace(
            term=1, world=layout.world, rank=rank, groups=groups, engine=engine, seal=None, experts=ExpertSet(3)
        )
        saver.save(shard, TrainingProgress(11, 10, "{}"))
        assert saver.wait(60.0)
    done = commit_checkpoint("r", run_dir, Commit(11, 1, layout.world.generation, tuple(written)))
    return Restore(11, done.path)


def _restored(layout: StateLayout, restore: Restore, rank: int) -> NamedRanges:
    ranges = zeros_like(_held(layout, rank, _values(layout.tensors)))
    read_state(restore, ranges, layout.tensors, "{}", rank, layout.world.size)
    return ranges


@pytest.mark.parametrize("absent", list(Absent))
def test_an_added_tensor_is_saved_and_restored_in_another_world(tmp_path: Path, absent: Absent) -> None:
    old, new = (_layout(_with_average(Origin.COPY, absent), *world) for world in ((0, "abc"), (1, "bd")))
    values = _values(old.tensors)
    restore = _saved(old, values, tmp_path)
    for rank in range(2):
        restored = _restored(new, restore, rank)
        assert any(name.startswith("ema/") for name in restored.names())
        assert all(
            torch.equal(held.data, values[name][held.start : held.stop].to(held.data)) for name, held in restored
        )


def test_an_added_tensor_that_a_checkpoint_lacks_keeps_its_first_values_or_is_refused(tmp_path: Path) -> None:
    restore = _saved(_layout(state_of(PARAMS, True, BUFFERS), 0, "abc"), _values(_with_average(Origin.COPY)), tmp_path)
    lenient = _layout(_with_average(Origin.COPY, Absent.FIRST), 1, "bd")
    average = [held for name, held in _restored(lenient, restore, 0) if name.startswith("ema/")]
    assert average and not any(held.data.any() for held in average)
    with pytest.raises(CheckpointCorrupt, match="of another model"):
        _restored(replace(lenient, tensors=_with_average(Origin.COPY)), restore, 0)
