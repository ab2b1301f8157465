"""Tokens of a split, read by their places: of a file that is all there, or of one whose blocks come as they are needed
(`orchestrator.data.token_blocks`)."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from orchestrator.sampling.chunks import Ints


class Tokens(Protocol):
    """Tokens of a split. Two implementations: a whole file, and blocks fetched from a bucket."""

    def __len__(self) -> int: ...

    def take(self, places: Ints) -> NDArray[np.unsignedinteger]:
        """The tokens at these places, of any shape, all of them in the split.

        Raises:
            StoreCorrupt: they don't have their digests.
            OSError: they can't be fetched now.
        """
        ...

    def fetch(self, places: Ints) -> bool:
        """Fetch what a later `take` of these places would have to wait for.

        Returns:
            False if there is no room for it, True if it is on this node now.

        Raises:
            StoreCorrupt, OSError: as `take`.
        """
        ...


class MappedTokens:
    """A complete tokens file, mapped into memory."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._array = np.asarray(np.memmap(path, dtype=dtype, mode="r"))

    def __len__(self) -> int:
        return len(self._array)

    def take(self, places: Ints) -> NDArray[np.unsignedinteger]:
        return self._array[places]

    def fetch(self, places: Ints) -> bool:
        return True
