"""AdamW as DeepSpeed steps it, and replay of the same updates on snapshots.

torch's fused kernel is elementwise, so an element's update has the same bits wherever it lies in memory, with one
exception: on a CPU it takes 64 bytes at once, and the remainder at the end of a tensor one by one, with other
roundings. So there is never a remainder: partitions are multiples of `PIECE_MULTIPLE`, and so are pieces here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from orchestrator.elastic.bucket_partition import PIECE_MULTIPLE
from orchestrator.engine.base import noop
from orchestrator.spec.train import TrainSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Snapshot, Update

PIECE = 1 << 18  # elements that are updated together: a piece and its gradients fit a core's cache

Row = tuple[str, int, int]  # a parameter's name, and elements [start, stop) of it


class AdamW(torch.optim.AdamW):
    """Calls back when an update begins, and keeps its gradients if requested. DeepSpeed steps it once for each group.

    Its state must exist before the first step. It calls the kernel itself: torch's own `step` would load torch's
    compiler, which takes a starting worker a second.
    """

    before_update: Callable[[], None] = staticmethod(noop)
    gradients: dict[int, Tensor] | None = None  # by id of the updated tensor, clipped; None: not wanted

    def __init__(self, params: list[dict[str, Any]], train: TrainSpec) -> None:
        super().__init__(params, lr=train.lr, fused=True, **_options(train))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        callback, self.before_update = self.before_update, noop
        callback()
        for group in self.param_groups:
            masters = [p for p in group["params"] if p.grad is not None]
            if self.gradients is not None:
                self.gradients |= {id(p): p.grad for p in masters}
            moments = [self.state[p] for p in masters]
            adamw(
                masters,
                [p.grad for p in masters],
                [m["exp_avg"] for m in moments],
                [m["exp_avg_sq"] for m in moments],
                [],
                [m["step"] for m in moments],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )


class Replayer:
    """Replays a rank's updates on the part of the state that it owns. A `Replay`.

    Args:
        device: where training does them: another kind of processor may round differently.
    """

    def __init__(self, train: TrainSpec, device: torch.device) -> None:
        self._options, self._device = _options(train), device

    @torch.no_grad()
    def __call__(self, state: NamedRanges, deltas: Sequence[Snapshot]) -> None:
        """
        Args:
            state: after the step before the first delta; becomes that after the last one. Where it lacks a parameter,
                since all ranks have it, only its moments are computed.
            deltas: of consecutive steps.
        """
        rows = [(n.removeprefix("grad/"), r.start, r.stop) for n, r in deltas[0].ranges if n.startswith("grad/")]
        parts, gradients = _Parts(state, self._device), [_Parts(delta.ranges, self._device) for delta in deltas]
        updates = [delta.update for delta in deltas if delta.update is not None]
        for piece in _pieces(rows):
            self._replay(parts, piece, updates, gradients)
        for name, place in deltas[-1].ranges:
            if name in parts.names:  # weights that other ranks update, and buffers
                state.view(name, place.start, place.stop).copy_(place.data)

    def _replay(
        self, state: "_Parts", piece: list[Row], updates: Sequence[Update], gradients: Sequence["_Parts"]
    ) -> None:
        masters = "master" if state.mixed else "param"
        master, exp_avg, exp_avg_sq = (state.read(kind, piece) for kind in (masters, "exp_avg", "exp_avg_sq"))
        (beta1, beta2), decay, eps = (self._options[key] for key in ("betas", "weight_decay", "eps"))
        for update, gradient in zip(updates, gradients, strict=True):
            adamw(
                [master],
                [gradient.read("grad", piece)],
                [exp_avg],
                [exp_avg_sq],
                [],
                [torch.tensor(float(update.number - 1), device=self._device)],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                lr=update.lr,
                weight_decay=decay,
                eps=eps,
            )
        state.write("exp_avg", piece, exp_avg)
        state.write("exp_avg_sq", piece, exp_avg_sq)
        state.write("param", piece, master)
        if state.mixed:
            state.write("master", piece, master)


class _Parts:
    """Named ranges, read and written as flat tensors on a device, multiples of `PIECE_MULTIPLE` long."""

    def __init__(self, ranges: NamedRanges, device: torch.device) -> None:
        self._ranges, self._device, self.names = ranges, device, set(ranges.names())
        self.mixed = any(name.startswith("master/") for name in self.names)

    def read(self, kind: str, piece: list[Row]) -> Tensor:
        """A copy, fp32; zeros for parameters that aren't held."""
        num_elements = sum(stop - start for _, start, stop in piece)
        parts = [
            self._ranges.view(f"{kind}/{name}", start, stop)
            if f"{kind}/{name}" in self.names
            else torch.zeros(stop - start)
            for name, start, stop in piece
        ]
        return torch.cat([*parts, torch.zeros(-num_elements % PIECE_MULTIPLE)]).to(self._device)

    def write(self, kind: str, piece: list[Row], flat: Tensor) -> None:
        """Write to the held ranges of it, in their own number format."""
        begin = 0
        for name, start, stop in piece:
            if f"{kind}/{name}" in self.names:
                self._ranges.view(f"{kind}/{name}", start, stop).copy_(flat[begin : begin + stop - start])
            begin += stop - start


def _pieces(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The same elements in portions of at most `PIECE`."""
    piece: list[Row] = []
    room = PIECE
    for name, start, stop in rows:
        while start < stop:
            end = min(stop, start + room)
            piece.append((name, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece


def _options(train: TrainSpec) -> dict[str, Any]:
    optimizer = train.optimizer
    return {"betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}
