"""Cache of finished blocks: a file of tokens per block, kept until the store is published, so that an interrupted
preparation can resume.

    DIR/.STORE.parts/lock                     held by the process that prepares STORE
    DIR/.STORE.parts/tokenizer-DIGEST/        the tokenizer, as in a store
    DIR/.STORE.parts/00000012.part            the documents of block 12: tokens, lengths, scores, footer
    DIR/.STORE.parts/store/                   the store while it is assembled

A part gets its name by a rename when it is whole. Its footer has a digest of its inputs and the sha256 of the rest, so
a part of another corpus, tokenizer or signal, or a damaged one, is made again. No store has any of these names.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.manifest import TOKENIZER
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.protocol.codec import from_plain, to_plain
from orchestrator.storage.atomic import new_directory, replacing

FOOTER_LENGTH_BYTES = 8
READ_BYTES = 1 << 20
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Footer:
    made_of: str
    num_documents: int
    num_tokens: int
    token_dtype: str
    sha256: str  # of all bytes before the footer


class PartWriter:
    """Writer of a part, from `written`: `add` every document."""

    def __init__(self, file: BinaryIO, made_of: str, token_dtype: str) -> None:
        self._file, self._made_of, self._dtype = file, made_of, token_dtype
        self._sha256 = hashlib.sha256()
        self._lengths, self._scores = array("q"), array("d")
        self.num_tokens = 0

    def add(self, tokens: NDArray[np.unsignedinteger], score: float) -> None:
        """Append a document; `score` is NaN if it is not known yet."""
        self._write(np.ascontiguousarray(tokens, self._dtype).tobytes())
        self._lengths.append(len(tokens))
        self._scores.append(score)
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        self._write(np.asarray(self._lengths, "<i8").tobytes())
        self._write(np.asarray(self._scores, "<f8").tobytes())
        footer = Footer(self._made_of, len(self._lengths), self.num_tokens, self._dtype, self._sha256.hexdigest())
        saved = json.dumps(to_plain(footer)).encode("ascii")
        self._file.write(saved + len(saved).to_bytes(FOOTER_LENGTH_BYTES, "little"))

    def _write(self, content: bytes) -> None:
        self._sha256.update(content)
        self._file.write(content)


@contextmanager
def written(path: Path, made_of: str, token_dtype: str) -> Iterator[PartWriter]:
    """Writer of a part that gets its name if the block succeeds, and is removed if it fails."""
    with replacing(path) as file:
        writer = PartWriter(file, made_of, token_dtype)
        yield writer
        writer.finish()


def checked(path: Path, made_of: str) -> Footer | None:
    """The footer of a whole part with the inputs `made_of`; None if it is missing, damaged or has other inputs."""
    try:
        with path.open("rb") as file:
            footer, size = _footer(file)
            file.seek(0)
            sha256 = hashlib.sha256()
            while size and (some := file.read(min(READ_BYTES, size))):
                sha256.update(some)
                size -= len(some)
    except (OSError, ValueError):
        return None
    good = footer is not None and footer.made_of == made_of and footer.sha256 == sha256.hexdigest()
    return footer if good else None


def lengths_of(path: Path, footer: Footer) -> NDArray[np.int64]:
    """Tokens of each document of a part."""
    offset = footer.num_tokens * np.dtype(footer.token_dtype).itemsize
    return np.fromfile(path, "<i8", footer.num_documents, offset=offset)


def documents_in(path: Path, footer: Footer) -> Iterator[tuple[NDArray[np.unsignedinteger], float]]:
    """Tokens and score of each document of a part, one in memory at a time."""
    dtype = np.dtype(footer.token_dtype)
    lengths_D = lengths_of(path, footer)
    offset = footer.num_tokens * dtype.itemsize + lengths_D.nbytes
    scores_D = np.fromfile(path, "<f8", footer.num_documents, offset=offset)
    with path.open("rb") as file:
        for length, score in zip(lengths_D.tolist(), scores_D.tolist(), strict=True):
            yield np.frombuffer(file.read(length * dtype.itemsize), dtype), score


def _footer(file: BinaryIO) -> tuple[Footer | None, int]:
    """The footer of a part, and the number of bytes before it. Raises OSError or ValueError without a footer."""
    end = file.seek(-FOOTER_LENGTH_BYTES, os.SEEK_END)
    length = int.from_bytes(file.read(FOOTER_LENGTH_BYTES), "little")
    if length > end:
        return None, 0
    file.seek(end - length)
    return from_plain(Footer, json.loads(file.read(length))), end - length


@contextmanager
def _locked(directory: Path, waits: bool) -> Iterator[None]:
    """Hold the lock of a directory, which is created. Its last holder may have removed both meanwhile: then again."""
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), (directory / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(lock.fileno()), (directory / "lock").stat()):
                yield
                return


class Parts:
    """The parts of one store, from `Parts.held`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @classmethod
    @contextmanager
    def held(cls, final: Path, waits: bool = False) -> Iterator["Parts"]:
        """The parts of the store `final`, locked for this process. `waits`: until another one that prepares it has
        ended; else that raises DataError. Without locks in the file system, the parts are this process's own."""
        directory = final.with_name(f".{final.name}.parts")
        with ExitStack() as opened:
            try:
                opened.enter_context(_locked(directory, waits))
            except BlockingIOError:
                raise DataError(
                    f"another process prepares {final} now",
                    remedy="Repeat the command once it is done: it finds that store.",
                    unchanged="Nothing was written.",
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                directory = directory.with_name(f"{directory.name}-{uuid4().hex}")
                directory.mkdir()
            yield cls(directory)

    @property
    def assembly(self) -> Path:
        """Path of the directory in which the store is assembled, which doesn't exist yet: an earlier one is removed."""
        path = self.directory / "store"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def path_of(self, block: int) -> Path:
        return self.directory / f"{block:08d}.part"

    def tokenizer(self) -> TextTokenizer | None:
        """The kept tokenizer; None if it is missing or damaged."""
        for folder in self.directory.glob("tokenizer-*"):
            with suppress(DataError, OSError):
                found = TextTokenizer.load(folder / TOKENIZER)
                if folder.name == _folder_of(found):
                    return found
        return None

    def keep_tokenizer(self, tokenizer: TextTokenizer) -> Path:
        """Save the tokenizer and return the path of its file."""
        folder = self.directory / _folder_of(tokenizer)
        shutil.rmtree(folder, ignore_errors=True)
        with new_directory(folder) as partial:
            tokenizer.save(partial / TOKENIZER)
        return folder / TOKENIZER

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _folder_of(tokenizer: TextTokenizer) -> str:
    return f"tokenizer-{tokenizer.digest[:16]}"
