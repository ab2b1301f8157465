"""Wait for the end of a run by run storage alone, without a cluster."""

import time

from orchestrator.errors import NotFinished
from orchestrator.protocol.status import RunStatus
from orchestrator.run_records.run_files import RunFiles
from orchestrator.storage.journal_age import LIVELY_S
from orchestrator.submission.waiting import until_ended

READ_EVERY_S = 2.0  # a status
AGE_EVERY_S = 30.0  # the age of a journal, for which an object is written


def until_ended_in_storage(files: RunFiles, timeout_s: float | None) -> RunStatus:
    """The status of a run that has ended, from run storage alone.

    Raises:
        NotFinished: it has not ended within `timeout_s`; or, without one, its journal is so old that `resume` would
            take its cluster for gone: a run without a cluster never ends.
    """
    look_s = time.monotonic()  # when the journal's age is due

    def status() -> RunStatus:
        nonlocal look_s
        found = files.status()
        if timeout_s is not None or found.phase.ended or time.monotonic() < look_s:
            return found
        if files.journal_age_s() > LIVELY_S:
            raise NotFinished(
                f"run {found.run_id} is {found.phase} by its journal, which has not been written for {LIVELY_S:.0f} s: "
                "its cluster may be gone",
                remedy=f"Continue it with `orchestrator resume {found.run_id}` and the same --storage, or wait on with "
                "--timeout.",
            )
        look_s += AGE_EVERY_S
        return found

    return until_ended(status, timeout_s, None, READ_EVERY_S)
