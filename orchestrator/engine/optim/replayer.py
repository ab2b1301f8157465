"""Replay of a rank's updates on snapshots, with the bits of the first time."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from orchestrator.elastic.bucket_partition import PIECE_MULTIPLE
from orchestrator.elastic.state_spec import MASTER, PARAM, ParamSpec
from orchestrator.engine.optim.rule import UpdateInfo
from orchestrator.engine.optim.stepper import ParamPart, Updates, places
from orchestrator.spec.train import TrainSpec
from orchestrator.state.ranges import NamedRanges
from orchestrator.state.snapshot import Snapshot, Update

PIECE = 1 << 18  # elements that are updated together: a piece and its gradients fit a core's cache
GRAD = "grad"

Row = tuple[ParamSpec, int, int]  # a parameter, and elements [start, stop) of it


class Replayer:
    """Replays a rank's updates on the part of the state that it owns. A `Replay`.

    Args:
        params: of the whole model.
        device: where training does them: another kind of processor may round differently.
    """

    def __init__(self, train: TrainSpec, params: Sequence[ParamSpec], device: torch.device) -> None:
        self._params = {param.name: param.with_settings(train) for param in params}
        self._updates, self._device = Updates(train), device

    @torch.no_grad()
    def __call__(self, state: NamedRanges, deltas: Sequence[Snapshot]) -> None:
        """
        Args:
            state: after the step before the first delta; becomes that after the last one. Where it lacks a parameter,
                since all ranks have it, only what is kept for its updates is computed.
            deltas: of consecutive steps.
        """
        named = [(n.removeprefix(f"{GRAD}/"), r) for n, r in deltas[0].ranges if n.startswith(f"{GRAD}/")]
        rows = [(self._params[name], held.start, held.stop) for name, held in named]
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
        master = state.read(MASTER if state.has_masters else PARAM, piece)
        kinds = self._updates.kinds(piece[0][0].update[0])
        kept, parts = {kind: state.read(kind, piece) for kind in kinds}, _parts_of(piece)
        for update, gradient in zip(updates, gradients, strict=True):
            at = UpdateInfo(update.number, update.lr)
            self._updates.apply(parts, master, gradient.read(GRAD, piece), kept, at)
        for kind, values in kept.items():
            state.write(kind, piece, values)
        state.write(PARAM, piece, master)
        if state.has_masters:
            state.write(MASTER, piece, master)


class _Parts:
    """Named ranges, read and written as flat tensors on a device, multiples of `PIECE_MULTIPLE` long."""

    def __init__(self, ranges: NamedRanges, device: torch.device) -> None:
        self._ranges, self._device, self.names = ranges, device, set(ranges.names())
        self.has_masters = any(name.startswith(f"{MASTER}/") for name in self.names)

    def read(self, kind: str, piece: list[Row]) -> Tensor:
        """A copy, fp32; zeros for parameters that aren't held."""
        named = [(f"{kind}/{param.name}", *_span(kind, param, start, stop)) for param, start, stop in piece]
        num_elements = sum(stop - start for _, start, stop in named)
        parts = [
            self._ranges.view(name, start, stop) if name in self.names else torch.zeros(stop - start)
            for name, start, stop in named
        ]
        return torch.cat([*parts, torch.zeros(-num_elements % PIECE_MULTIPLE)]).to(self._device)

    def write(self, kind: str, piece: list[Row], flat: Tensor) -> None:
        """Write to the held ranges of it, in their own number format."""
        for here, (param, start, stop) in zip(places(kind, _parts_of(piece)), piece, strict=True):
            if (name := f"{kind}/{param.name}") in self.names:
                self._ranges.view(name, *_span(kind, param, start, stop)).copy_(flat[here])


def _span(kind: str, param: ParamSpec, start: int, stop: int) -> tuple[int, int]:
    """Elements of a kind of state that belong to elements [start, stop) of the parameter."""
    size = math.prod(param.shape_of(kind))
    return (start, stop) if size == param.numel else (0, size)


def _parts_of(piece: Sequence[Row]) -> list[ParamPart]:
    """Where the rows of a piece are in a flat tensor."""
    parts, begin = [], 0
    for param, start, stop in piece:
        parts.append(ParamPart(param, slice(begin, begin + stop - start), start))
        begin += stop - start
    return parts


def _pieces(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The same elements in portions of at most `PIECE`, each of parameters that are updated alike. A parameter that is
    updated as a whole is one."""
    for update in dict.fromkeys(param.update for param, _, _ in rows):
        piece: list[Row] = []
        room = PIECE
        for param, start, stop in (row for row in rows if row[0].update == update):
            if param.is_whole:
                yield [(param, start, stop)]
                continue
            while start < stop:
                end = min(stop, start + room)
                piece.append((param, start, end))
                room -= end - start
                start = end
                if room == 0:
                    yield piece
                    piece, room = [], PIECE
        if piece:
            yield piece
