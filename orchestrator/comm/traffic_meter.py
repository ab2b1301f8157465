"""The byte ledger: what this process has sent to other workers, by kind.

Entered where a collective or a stream is called, by how its algorithm sends: an all-to-all and a stream send each byte
once; gloo's ring sends (W - 1) / W of a gathered tensor from each of W ranks, and twice that of a reduced one. Headers
of TCP and IP aren't counted, nor is what goes through Ray or the rendezvous store.
"""

import threading

from torch import Tensor

from orchestrator.protocol.usage import Traffic, TrafficKind

_lock = threading.Lock()
_totals = dict.fromkeys(TrafficKind, Traffic())


def enter(kind: TrafficKind, payload: int, index: int = 0, raw: int | None = None, across: int = 0) -> None:
    """Bytes that leave this process for other workers, `across` of them to other nodes. From any thread."""
    traffic = Traffic(payload + index if raw is None else raw, payload, index, across)
    with _lock:
        _totals[kind] += traffic


def enter_gathered(kind: TrafficKind, gathered: Tensor, num_ranks: int) -> None:
    """A tensor of which every rank had an equal part, and has all of it now."""
    enter(kind, gathered.nbytes * (num_ranks - 1) // num_ranks)


def enter_reduced(kind: TrafficKind, reduced: Tensor, num_ranks: int) -> None:
    """A tensor that was summed over the ranks, each of which has the sum now."""
    enter(kind, 2 * reduced.nbytes * (num_ranks - 1) // num_ranks)


def totals() -> dict[TrafficKind, Traffic]:
    """Since the process began."""
    with _lock:
        return dict(_totals)


class Since:
    """What was sent between two looks."""

    def __init__(self) -> None:
        self._before = totals()

    def look(self) -> dict[TrafficKind, Traffic]:
        """Since the last look, or since this was made. All kinds."""
        now, before = totals(), self._before
        self._before = now
        return {kind: now[kind] - before[kind] for kind in TrafficKind}
