"""How difficult a document is, by one of several signals: higher is harder.

Which of them helps a model learn is a question for measurement; a curriculum uses only the order that they give.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.data.prepare.reference_model import PairCounts, reference_loss
from orchestrator.data.tokenizer import TextTokenizer
from orchestrator.errors import DataError
from orchestrator.spec.curriculum import SIGNALS
from orchestrator.user_code import imported

WINDOW = 50  # tokens
HERE = Path()
LARGEST = float(np.finfo(np.float32).max)  # that the index holds
Tokens = NDArray[np.integer]
Signal = Callable[[Tokens], float]


def signal_of(
    name: str,
    tokenizer: TextTokenizer,
    counts: Callable[[], NDArray[np.int64]],
    pairs: Callable[[], PairCounts],
    is_training: bool,
    code_dir: Path = HERE,
) -> Signal:
    """What scores a document from its tokens.

    Args:
        name: of a signal, or `package.module:score`, which gets the document's text.
        counts: how often each token of the vocabulary occurs in the training split; asked for if it is needed.
        pairs: how often tokens follow one another in the training split's documents; asked for if it is needed.
        is_training: the documents to score are those of the training split.
        code_dir: the directory that a function of the user's own comes from.

    Raises:
        DataError: there is no such function.
    """
    if ":" in name:
        function = _imported(name, code_dir)
        return lambda tokens: float(function(_text(tokenizer, tokens)))
    if name == "length":
        return lambda tokens: float(len(tokens))
    if name == "compression":
        return lambda tokens: _compression(_text(tokenizer, tokens))
    if name == "rarity":
        surprisal_V = _surprisal(counts())
        return lambda tokens: float(surprisal_V[tokens[1:]].mean()) if len(tokens) > 1 else 0.0
    if name == "diversity":
        return diversity
    if name == "reference_loss":
        return partial(reference_loss, pairs(), was_added=is_training)
    raise ValueError(f"there is no signal {name}")


def check_signal(name: str, code_dir: Path = HERE) -> None:
    """Raises DataError if there is no such signal."""
    if ":" in name:
        _imported(name, code_dir)
    elif name not in SIGNALS:
        raise DataError(
            f"curriculum.signal {name}: it must be {', '.join(SIGNALS)} or a function as package.module:score",
            unchanged="Nothing was written.",
        )


def scores(signal: Signal, name: str, documents: Iterator[tuple[str, Tokens]]) -> NDArray[np.float64]:
    """The scores of (id, tokens) one after the other. Raises DataError naming the document that has none."""
    found = []
    for document_id, tokens in documents:
        try:
            score = signal(tokens)
        except Exception as error:
            raise _without_score(name, document_id, f"raised {type(error).__name__}: {error}") from error
        if not math.isfinite(score) or abs(score) > LARGEST:
            raise _without_score(name, document_id, f"gave {score}")
        found.append(score)
    return np.array(found)


def diversity(tokens: Tokens) -> float:
    """Mean share of distinct tokens in windows of `WINDOW`: the moving-average type-token ratio, which unlike the plain
    one doesn't fall with length (Covington and McFall, "Cutting the Gordian Knot", Journal of Quantitative Linguistics,
    2010)."""
    tokens = tokens[1:]  # the document's own token says nothing
    n = len(tokens)
    window = min(WINDOW, n)
    if n == 0:
        return 0.0
    by_token = np.argsort(tokens, kind="stable")
    before = np.full(n, -1)  # where the same token stood last
    same = tokens[by_token[1:]] == tokens[by_token[:-1]]
    before[by_token[1:][same]] = by_token[:-1][same]
    place = np.arange(n)
    # A token counts in all windows that hold it and not the one before: their first places.
    first = np.maximum(np.maximum(before + 1, place - window + 1), 0)
    last = np.minimum(place, n - window)
    return float(np.maximum(last - first + 1, 0).sum() / ((n - window + 1) * window))


def _surprisal(counts_V: NDArray[np.int64]) -> NDArray[np.float64]:
    """Nats of each token by its frequency, one added to each count."""
    surprisal_V: NDArray[np.float64] = -np.log((counts_V + 1) / (counts_V.sum() + len(counts_V)))
    return surprisal_V


def _compression(text: str) -> float:
    raw = text.encode("utf-8")
    return len(zlib.compress(raw, 6)) / len(raw) if raw else 0.0


def _text(tokenizer: TextTokenizer, tokens: Tokens) -> str:
    return tokenizer.decode(tokens[1:].tolist())


def _imported(name: str, code_dir: Path) -> Callable[[str], float]:
    module, _, attribute = name.partition(":")
    try:
        function: Callable[[str], float] = getattr(imported(module, code_dir), attribute)
    except Exception as error:  # whatever the module does when it is imported
        raise DataError(
            f"curriculum.signal {name} can't be imported: {error}",
            remedy="Name a function of a module in the current directory, or in curriculum.code_dir.",
            unchanged="Nothing was written.",
        ) from error
    return function


def _without_score(name: str, document_id: str, what: str) -> DataError:
    return DataError(
        f"curriculum.signal {name} {what} for the document {document_id}",
        remedy="Have it return a finite number for every text.",
        unchanged="No store was written.",
    )
