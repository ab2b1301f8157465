"""Weights of a directory that transformers has saved, read into ranges of the state."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orchestrator.checkpoint.hf.pretrained import Part
from orchestrator.elastic.state_spec import begins_as
from orchestrator.errors import CheckpointCorrupt
from orchestrator.state.ranges import NamedRanges

CHUNK = 1 << 22  # elements read at once, which keeps the copy small


class WeightSource(Protocol):
    """Where the tensors of a model are in a directory."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def parts(self, name: str) -> tuple[Part, ...]: ...


@torch.no_grad()
def read_weights(source: WeightSource, ranges: NamedRanges) -> None:
    """Fill weights, masters, their averages and router biases that the source has. Other state keeps its values.

    Raises:
        CheckpointCorrupt: a file can't be read.
    """
    with _Weights(source) as weights:
        for name, held in ranges:
            ours = begins_as(name)
            for start, values in weights.read(ours, held.start, held.stop) if ours is not None else ():
                held.data[start - held.start : start - held.start + len(values)].copy_(values)


class _Weights(ExitStack):
    """The open files of a directory; a context manager."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__()
        self._source = source
        self._files: dict[Path, safe_open] = {}

    def read(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Elements [start, stop) of our flattened tensor, as runs with the index of their first element."""
        before = 0
        for part in self._source.parts(name):
            shape = self._source.shapes[part.key][0 if part.index is None else 1 :]
            row = math.prod(shape[1:])
            low, high = max(start - before, 0), min(stop - before, shape[0] * row)
            rows_at_once = max(1, CHUNK // row)
            for first in range(low // row, -(-high // row), rows_at_once):
                last = min(first + rows_at_once, -(-high // row))
                values = self._rows(part, first, last).flatten()
                begin, end = max(low, first * row), min(high, last * row)
                yield before + begin, values[begin - first * row : end - first * row]
            before += shape[0] * row

    def _rows(self, part: Part, first: int, last: int) -> Tensor:
        try:
            if part.file not in self._files:
                self._files[part.file] = self.enter_context(safe_open(part.file, framework="pt"))
            tensor = self._files[part.file].get_slice(part.key)  # type: ignore[no-untyped-call]
            rows: Tensor = tensor[first:last] if part.index is None else tensor[part.index, first:last]
        except (SafetensorError, OSError) as error:
            raise CheckpointCorrupt(f"{part.file} can't be read: {error}") from error
        return rows
