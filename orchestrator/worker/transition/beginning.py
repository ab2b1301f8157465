"""The weights that a run begins with, read from a directory of another's model into a rank's shard.

Each rank reads the tensors that it holds, of experts its own only, and of the fp32 masters its part. Whatever number
format the files have, masters keep it without loss, and weights in lower precision are rounded from it.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orchestrator.checkpoint.hf.pretrained import Part, Pretrained, open_pretrained
from orchestrator.errors import CheckpointCorrupt
from orchestrator.spec.model import ModelSpec
from orchestrator.state.ranges import NamedRanges

CHUNK = 1 << 22  # elements read at once, so that memory for a copy stays small
MOMENTS = ("exp_avg/", "exp_avg_sq/")


@torch.no_grad()
def read_pretrained(spec: ModelSpec, ranges: NamedRanges) -> None:
    """Fill this rank's ranges: weights, masters and router biases from `spec.init_from`, moments with zeros.

    Raises:
        UsageError, CheckpointCorrupt: the directory isn't there any more, or isn't of this model.
    """
    assert spec.init_from is not None
    source = open_pretrained(Path(spec.init_from))
    source.check(spec)
    with _Weights(source) as weights:
        for name, held in ranges:
            if name.startswith(MOMENTS):
                held.data.zero_()
                continue
            _, _, ours = name.partition("/")
            for start, values in weights.read(ours, held.start, held.stop):
                held.data[start - held.start : start - held.start + len(values)].copy_(values)


class _Weights(ExitStack):
    """The open files of a directory; a context manager."""

    def __init__(self, source: Pretrained) -> None:
        super().__init__()
        self._source = source
        self._files: dict[Path, safe_open] = {}

    def read(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """Elements [start, stop) of our flattened tensor, as runs with the place of their first element."""
        before = 0
        for part in self._source.parts(name):
            shape = self._source.shapes[part.key][0 if part.index is None else 1 :]
            row = shape[1] if len(shape) > 1 else 1
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
