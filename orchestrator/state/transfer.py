"""Execution of a transfer plan: ranges in, ranges out, peer to peer, in bounded chunks.

Both ends of a pair split their common list of moves into the same chunks, so only data is sent. Each pair has its own
thread at either end: receivers that took their sources one after another could deadlock in a circle. Memory beside the
two shards is one chunk per pair.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from orchestrator.comm.transport.peer_group import PeerGroup
from orchestrator.elastic.state_layout import IntArray
from orchestrator.elastic.transfer_plan import TransferPlan
from orchestrator.state.ranges import NamedRanges

CHUNK_BYTES = 4 << 20  # a message; smaller moves are packed into one, larger ones are split

Piece = tuple[int, int, int]  # (tensor, start, stop)


def execute_transfer(
    plan: TransferPlan, me: str, old: NamedRanges | None, new: NamedRanges | None, peers: PeerGroup
) -> None:
    """Fill `new` from `old` and from the peers. Collective over the plan's workers.

    Args:
        plan: computed identically by every worker.
        old: state that this worker holds; None if it was no member. Only read.
        new: memory for its new state; None if it is no member. Every element is written.
        peers: connects the plan's workers.

    Raises:
        RuntimeError: a peer failed; `old` is unchanged, `new` is undefined.
    """
    mine = plan.for_worker(me)
    keep(plan, mine.keeps, old, new)
    for tensor, start, stop in mine.zeros.tolist():
        _held(new).view(plan.names[tensor], start, stop).zero_()
    jobs: list[Callable[[], None]] = []
    for destination, rows in mine.sends.items():
        jobs.append(lambda d=destination, r=rows: _send(plan, r, _held(old), peers, d))  # type: ignore[misc]
    for source, rows in mine.receives.items():
        jobs.append(lambda s=source, r=rows: _receive(plan, r, _held(new), peers, s))  # type: ignore[misc]
    _run_all(jobs, peers)


def keep(plan: TransferPlan, rows: IntArray, old: NamedRanges | None, new: NamedRanges | None) -> None:
    """Copy elements that stay from the old shard's memory to the new one's."""
    for tensor, start, stop in rows.tolist():
        name = plan.names[tensor]
        _held(new).view(name, start, stop).copy_(_held(old).view(name, start, stop))


def _run_all(jobs: Sequence[Callable[[], None]], peers: PeerGroup) -> None:
    """Run every job in a thread. The first failure closes the group, which frees the others from their peers."""
    if not jobs:
        return
    with ThreadPoolExecutor(max_workers=len(jobs), thread_name_prefix="transfer") as pool:
        futures = [pool.submit(job) for job in jobs]
        failures = []
        for future in futures:
            try:
                future.result()
            except RuntimeError as error:
                failures.append(error)
                peers.close()
    if failures:
        raise failures[0]


def _send(plan: TransferPlan, rows: IntArray, old: NamedRanges, peers: PeerGroup, destination: str) -> None:
    for chunk in chunks(rows, plan.itemsize):
        views = [old.view(plan.names[tensor], start, stop) for tensor, start, stop in chunk]
        if len(views) == 1 and views[0].device.type == "cpu":
            peers.send(views[0].view(torch.uint8), destination)
        else:
            peers.send(_packed(views), destination)


def _packed(views: Sequence[Tensor]) -> Tensor:
    """The bytes of all views in one host buffer. They may be on different devices: a survivor sends its own shard from
    its device, and snapshots of others from host memory."""
    packed = torch.empty(sum(view.nbytes for view in views), dtype=torch.uint8)
    for part, view in zip(torch.split(packed, [view.nbytes for view in views]), views, strict=True):
        part.copy_(view.view(torch.uint8))
    return packed


def _receive(plan: TransferPlan, rows: IntArray, new: NamedRanges, peers: PeerGroup, source: str) -> None:
    for chunk in chunks(rows, plan.itemsize):
        views = [new.view(plan.names[tensor], start, stop) for tensor, start, stop in chunk]
        adds = [plan.accumulates[tensor] for tensor, _, _ in chunk]
        if len(views) == 1 and views[0].device.type == "cpu" and not adds[0]:
            peers.receive(views[0].view(torch.uint8), source)
            continue
        sizes = [v.numel() * v.element_size() for v in views]
        staging = torch.empty(sum(sizes), dtype=torch.uint8)
        peers.receive(staging, source)
        for view, part, add in zip(views, torch.split(staging, sizes), adds, strict=True):
            _deliver(view, part, add)


def _deliver(view: Tensor, part: Tensor, adds: bool) -> None:
    # A part may start anywhere in the staging buffer, but a view of wider elements must start at a multiple of them.
    aligned = part.storage_offset() % view.element_size() == 0
    values = (part if aligned else part.clone()).view(view.dtype)
    if adds:
        view.add_(values.to(view.device))
    else:
        view.copy_(values)


def chunks(rows: IntArray, itemsize: IntArray, chunk_bytes: int = CHUNK_BYTES) -> Iterator[list[Piece]]:
    """Split moves into messages of at most `chunk_bytes`, in order. A move that fills a message goes alone.

    Args:
        rows: [n, 3] (tensor, start, stop).
        itemsize: bytes per element, by tensor.
    """
    chunk: list[Piece] = []
    room = chunk_bytes
    for tensor, start, stop in rows.tolist():
        size = int(itemsize[tensor])
        while start < stop:
            fits = room // size
            if fits == 0 or (chunk and (stop - start) * size >= chunk_bytes):
                yield chunk
                chunk, room = [], chunk_bytes
                continue
            end = min(stop, start + fits)
            chunk.append((tensor, start, end))
            room -= (end - start) * size
            start = end
    if chunk:
        yield chunk


def _held(ranges: NamedRanges | None) -> NamedRanges:
    if ranges is None:
        raise RuntimeError("the plan gives this worker a part in a world that it is no member of")
    return ranges
