"""A client that serves what a real one saw: four looks at a cluster with two runs, and the journal of one of them.

Recorded from `jobs/quickstart.yaml` beside a run of one worker, whose member w2 was killed at step 90. The journal
ends at the third look and lacks the controller's own state and the steps before 70.
"""

import json
from dataclasses import replace
from pathlib import Path

from orchestrator.errors import ClusterUnreachable, NotFound, UsageError
from orchestrator.protocol.codec import from_plain
from orchestrator.protocol.messages import DesiredRunState
from orchestrator.protocol.status import RunStatus
from tests.support.recorded_run import write_journal

RECORDED = Path(__file__).parent / "recorded"
RUNS = ("quickstart", "spare")
AFTER_A_LOSS, RESCALING, THREE_WORKERS, ENDED = range(4)  # looks


def recorded_looks(storage: Path) -> list[tuple[RunStatus, ...]]:
    """As the client returned them, but for the path of run storage."""
    lines = (RECORDED / "looks.jsonl").read_text().splitlines()
    looks = [[from_plain(RunStatus, plain) for plain in json.loads(line)] for line in lines]
    return [tuple(replace(status, run_dir=str(storage / status.run_id)) for status in look) for look in looks]


class RecordedClient:
    """Returns the look at index `now`, or no run if it `hides` them. Requests are kept in `requests`."""

    address = "10.0.0.5:6379"

    def __init__(self, storage: Path) -> None:
        self._looks = recorded_looks(storage)
        self.now, self.is_gone, self.hides, self.most = THREE_WORKERS, False, False, 4
        self.is_joining = False
        self.requests: list[tuple[str, str, int | None]] = []
        write_journal(storage / "quickstart", json.loads((RECORDED / "journal.json").read_text())["events"])

    def list(self) -> tuple[RunStatus, ...]:
        if self.is_gone:
            raise ClusterUnreachable(f"no cluster answers at {self.address}: Connection refused")
        return () if self.hides else self._looks[self.now]

    def get(self, run_id: str) -> RunStatus:
        for status in self.list():
            if status.run_id == run_id:
                return status
        raise NotFound(f"this cluster has no run {run_id!r}")

    def scale(self, run_id: str, workers: int | None) -> DesiredRunState:
        if workers is not None and workers > self.most:
            raise UsageError(f"{workers} workers are more than workers.max of {run_id}, which is {self.most}")
        return self._act("scale", run_id, workers)

    def pause(self, run_id: str) -> DesiredRunState:
        return self._act("pause", run_id, None)

    def stop(self, run_id: str) -> DesiredRunState:
        return self._act("stop", run_id, None)

    def _act(self, what: str, run_id: str, workers: int | None) -> DesiredRunState:
        self.requests.append((what, run_id, workers))
        return DesiredRunState(seq=len(self.requests), workers=workers or 0)
