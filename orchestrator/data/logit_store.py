"""What a teacher predicts for the rows of a token store, computed once: of each token the likeliest next ones.

    DIR/manifest.json      a `LogitManifest`, written last
    DIR/SPLIT.ids          (rows, T, K): the K likeliest tokens, uint16 or uint32
    DIR/SPLIT.logs         (rows, T, K): log-probabilities of these at the temperature, float16
    DIR/SPLIT.rest         (rows, T): of all others together, float32

A token's prediction depends on those before it in its row, so such a store is for rows of one length alone, and for
attention as it was: within documents or across. The tail is kept, as a student of the K tokens alone would learn to
give the others nothing.

Shape legend: R = rows, T = tokens of a row, K = tokens of which there are log-probabilities.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from orchestrator.data.manifest import MANIFEST, SPLITS, FileDigest, Split
from orchestrator.data.store import check_file
from orchestrator.errors import DataError, StoreCorrupt
from orchestrator.spec.distill import PREDICTION

FORMAT: Literal["orchestrator-logits-v1"] = "orchestrator-logits-v1"
AGAIN = "compute it again: orchestrator data teach."
PARTS = ("ids", "logs", "rest")


class LogitOptions(BaseModel):
    """All that the content depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    store: str  # digest
    teacher_sha256: str
    sequence_length: int
    isolate_documents: bool
    top_k: int
    temperature: float
    vocab_size: int

    @property
    def name(self) -> str:
        """Name of the directory. Another kind of processor may make other bits of the same options."""
        return "logits-" + hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def dtype(self, part: str) -> np.dtype[np.generic]:
        """Number format of a file."""
        if part == "ids":
            return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        return np.dtype("<f2" if part == "logs" else "<f4")

    def stored(self, part: str, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Values in the number format of a file; log-probabilities beyond it are its lowest one."""
        if part == "logs":
            values = np.maximum(values, np.finfo(np.float16).min)
        return values.astype(self.dtype(part))

    def shape(self, part: str, num_rows: int) -> tuple[int, ...]:
        """Shape of a file's array."""
        tokens = (num_rows, self.sequence_length)
        return tokens if part == "rest" else (*tokens, self.top_k)

    def num_bytes(self, part: str, num_rows: int) -> int:
        """Size of a file."""
        return math.prod(self.shape(part, num_rows)) * self.dtype(part).itemsize


class LogitManifest(BaseModel):
    """Content of `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["orchestrator-logits-v1"]
    options: LogitOptions
    teacher: str  # where it was
    num_rows: dict[Split, int]
    files: dict[str, FileDigest]


@dataclass(frozen=True)
class LogitStore:
    """Predictions, read side.

    Args:
        directory: of the files.
        arrays: by (split, part), memory-mapped.
    """

    directory: Path
    manifest: LogitManifest
    arrays: Mapping[tuple[Split, str], NDArray[np.generic]]

    @classmethod
    def open(cls, directory: Path, verify: bool = False) -> "LogitStore":
        """Open the predictions in a directory, after checking the sizes of its files; with `verify` their digests too.

        Raises:
            DataError: there are none.
            StoreCorrupt: a file doesn't match the manifest.
        """
        manifest = _manifest(directory)
        arrays: dict[tuple[Split, str], NDArray[np.generic]] = {}
        for split in SPLITS:
            for part in PARTS:
                path, options = directory / file_of(split, part), manifest.options
                try:
                    check_file(path, manifest.files[path.name], verify)
                except StoreCorrupt as error:
                    raise StoreCorrupt(error.message, remedy=f"Move {directory} away and {AGAIN}") from error
                shape = options.shape(part, manifest.num_rows[split])
                if not manifest.num_rows[split]:
                    arrays[split, part] = np.zeros(shape, options.dtype(part))
                    continue
                try:
                    arrays[split, part] = np.memmap(path, options.dtype(part), "r", shape=shape)
                except ValueError as error:
                    reason = f"{path} is not as {MANIFEST} beside it says: {error}"
                    raise StoreCorrupt(reason, remedy=f"Move {directory} away and {AGAIN}") from error
        return cls(directory, manifest, arrays)

    def check(self, store: str) -> None:
        """Raises DataError unless these are predictions for the token store of this digest."""
        if store != self.manifest.options.store:
            raise DataError(
                f"{self.directory} has predictions for another token store, {self.manifest.options.store[:12]}…, than "
                f"the run's, {store[:12]}…",
                remedy="Name the store for which they were computed as data.source.",
                unchanged="Nothing was started.",
            )

    def rows(self, split: Split, rows_R: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
        """Arrays of a batch: `teacher_ids` (R, T, K), int64; `teacher_logs` (R, T, K) and `teacher_rest` (R, T),
        fp32. Raises ValueError for a row that doesn't exist."""
        num_rows = self.manifest.num_rows[split]
        if len(rows_R) and not 0 <= rows_R.min() <= rows_R.max() < num_rows:
            raise ValueError(f"{self.directory} has {num_rows} rows of {split}; {rows_R.max()} was asked for")
        wanted = (np.int64, np.float32, np.float32)
        taken = (np.asarray(self.arrays[split, part][rows_R]) for part in PARTS)
        return {name: array.astype(dtype) for name, array, dtype in zip(PREDICTION, taken, wanted, strict=True)}


def _manifest(directory: Path) -> LogitManifest:
    """Raises DataError if the directory has none of this kind."""
    try:
        return LogitManifest.model_validate_json((directory / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        is_other = isinstance(error, ValidationError) or (directory / MANIFEST).exists()
        has = f"its {MANIFEST} is of something else, or damaged" if is_other else f"it holds no {MANIFEST}"
        raise DataError(
            f"{directory} has no predictions of a teacher: {has}",
            remedy="Name a directory that `orchestrator data teach` has written.",
            unchanged="Nothing was started.",
        ) from error


def file_of(split: Split, part: str) -> str:
    """Name of a file."""
    return f"{split}.{part}"
