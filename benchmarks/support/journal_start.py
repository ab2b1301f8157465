"""Start of a controller from a run's journal, in a process of its own.

    python -m benchmarks.support.journal_start RUN_DIR

Prints `{"start_s", "peak_rss_mb", "step"}`: the time from taking the next term until the history is read, what the
process had in memory at most, imports included, and the newest committed step.
"""

import json
import re
import sys
import time
from pathlib import Path

from benchmarks.support.journals import LIMITS
from orchestrator.run_records.journaled_run import JournaledRun


def peak_rss_mb() -> float:
    """Of this program alone: `getrusage` counts what was there before it, too."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


if __name__ == "__main__":
    began_s = time.perf_counter()
    memory = JournaledRun(Path(sys.argv[1]), LIMITS)
    figures = {
        "start_s": time.perf_counter() - began_s,
        "peak_rss_mb": peak_rss_mb(),
        "step": memory.progress.watermark,
    }
    print(json.dumps(figures))
