"""Gradients in buckets on real ranks, against sums made plainly."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import Store

from orchestrator.comm.gradients.bucket import Bucket
from orchestrator.comm.gradients.buckets import Buckets
from orchestrator.comm.gradients.reduce_scatter import ReduceScatter
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.process_groups import connect
from orchestrator.errors import EntrypointError
from orchestrator.worker.shard.model_agreement import check_order
from tests.support import devices
from tests.support.ranks import Ranks

pytestmark = pytest.mark.long_emulated

SIZES = (5, 48, 7, 33, 21, 64)
CUTS = ((5,), (4, 3), (2, 1), (0,))  # the last parameters first


class Several(nn.Module):
    """Parameters that a loss reaches one after the other, in any order, with any of them left out."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(n, generator=generator).to(devices.device())) for n in SIZES
        )

    def forward(self, x: float, order: list[int]) -> Tensor:
        y = torch.tensor(x, device=devices.device())
        for index in order:  # nested, so that gradients come in the reverse order
            y = (self.weights[index] * y).sin().mean()
        return y


def _micro_batches(rank: int, case: str) -> Iterator[tuple[float, list[int]]]:
    everything = list(range(len(SIZES)))
    for number in range(3):
        order = everything
        if case == "another order" and rank == 1:
            order = [3, 0, 5, 1, 4, 2]
        elif case == "unused":
            order = [i for i in everything if i != 2 and (i != 4 or rank == 0)]
        elif case == "nothing on one" and rank == 1:
            order = []
        yield 1.0 + number + 10 * rank, order


@pytest.fixture(scope="module")
def ranks(device: str) -> Iterator[Ranks]:
    """Processes of these tests alone: in those of others, buckets were once not sent before the end of a pass."""
    pool = Ranks(device)
    yield pool
    pool.close()


def _sums(
    rank: int, world_size: int, store: Store, prefix: str, case: str, every_micro_batch: bool, overlap: bool
) -> tuple[list[Tensor], list[Tensor], int]:
    """Pieces of the sums, the same pieces by plain all-reduce, and how many buckets had left before backward ended."""
    groups = connect(store, prefix, rank, ExpertPlacement.balanced(1, world_size), devices.backend())
    model, plain = Several(), Several()
    multiple = world_size * 4
    made = []
    for cut in CUTS:
        params = [model.weights[index] for index in sorted(cut)]
        numel = -(-sum(p.numel() for p in params) // multiple) * multiple
        made.append(Bucket(params, numel, ReduceScatter(groups.reduction, True), devices.device()))
    buckets = Buckets(made, every_micro_batch, overlap)
    left = 0
    micro_batches = list(_micro_batches(rank, case))
    for number, (x, order) in enumerate(micro_batches):
        buckets.begin_micro_batch(last=number == len(micro_batches) - 1)
        if order:
            model(x, order).backward()
            plain(x, order).backward()
        left = sum(bucket._under_way is not None or bucket._sum is not None for bucket in made)
        buckets.end_micro_batch()
    pieces = buckets.sums()
    buckets.close()
    assert all(param.grad is None for param in model.parameters())
    wanted = []
    for cut, piece in zip(CUTS, pieces, strict=True):
        flat = torch.zeros_like(piece).repeat(world_size)
        gradients = [plain.weights[i].grad for i in sorted(cut)]
        whole = torch.cat(
            [flat.new_zeros(SIZES[i]) if g is None else g for i, g in zip(sorted(cut), gradients, strict=True)]
        )
        flat[: len(whole)] = whole
        dist.all_reduce(flat)
        wanted.append(flat.view(world_size, -1)[rank].cpu())
    return [piece.cpu() for piece in pieces], wanted, left


@pytest.mark.parametrize("every_micro_batch", [False, True], ids=["once", "every micro-batch"])
@pytest.mark.parametrize("case", ["alike", "another order", "unused", "nothing on one"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_sums_are_those_of_an_all_reduce_and_do_not_depend_on_overlap(
    ranks: Ranks, world_size: int, case: str, every_micro_batch: bool
) -> None:
    args: tuple[Any, ...] = (case, every_micro_batch)
    overlapped = ranks.run(_sums, world_size, *args, True)
    afterwards = ranks.run(_sums, world_size, *args, False)
    for (pieces, wanted, _), (others, _, _) in zip(overlapped, afterwards, strict=True):
        for piece, plain, other in zip(pieces, wanted, others, strict=True):
            torch.testing.assert_close(piece, plain, rtol=1e-6, atol=1e-7)
            assert torch.equal(piece, other)
    if case == "alike":
        assert [left for *_, left in overlapped] == [len(CUTS)] * world_size
    if case == "alike" and not every_micro_batch:
        assert [left for *_, left in afterwards] == [0] * world_size


def test_a_bucket_is_cut_into_equal_pieces() -> None:
    class Three:
        num_pieces = 3

    param = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="a bucket of 4 elements; its size is at least that of its parameters, 5"):
        Bucket([param], 4, Three(), torch.device("cpu"))  # type: ignore[arg-type]


def _checked(rank: int, world_size: int, store: Store, prefix: str, names: list[str], other: list[str]) -> str:
    groups = connect(store, prefix, rank, ExpertPlacement.balanced(1, world_size), devices.backend())
    try:
        check_order(other if rank == 1 else names, "mine:build", groups.exchange, devices.device())
    except EntrypointError as error:
        return error.message
    return ""


def test_a_rank_with_another_parameter_list_is_named_before_any_rank_waits(ranks: Ranks) -> None:
    names = ["a (3,), b (2,)", "c (4,)"]
    assert ranks.run(_checked, 3, names, names) == [""] * 3
    for other in (names[::-1], names[:1], [*names, "d (1,)"]):
        for message in ranks.run(_checked, 3, names, other):
            assert "mine:build has other parameters, or another order of them, on rank 1 than on rank 0" in message
