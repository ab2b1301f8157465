"""How long a controller takes to start from a long journal, and how much memory that takes.

    python -m benchmarks.journal [--quick]

Journals of 10^3 to 10^6 events, an entry per step, are made without flushing. Each is started from in processes of its
own (`benchmarks.support.journal_start`), in turn, with files cached. `compacted` is the product; `entries` is the same
journal without compaction, all entries of which are read, up to 10^5 events. Also measured: the storage calls of
compactions, of which no decision of a controller waits for more than one, and going back 1,000 steps.
"""

import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Result, Spread, alternate, at_most, median_interval, run, say
from benchmarks.support.journals import LIMITS, JournalMaker
from orchestrator.run_records.rollback import progress_up_to
from orchestrator.run_records.run_history import RunHistory
from orchestrator.storage.directory import DirectoryObjects

SIZES, QUICK_SIZES = (10**3, 10**4, 10**5, 10**6), (10**3, 3 * 10**3)
MOST_ENTRIES = 10**5  # that are read uncompacted
ROUNDS, QUICK_ROUNDS = 10, 1
WANTED_S, WANTED_MB = 1.0, 100.0
BACK_STEPS = 1000


def measure(quick: bool) -> Result:
    sizes, rounds = (QUICK_SIZES, QUICK_ROUNDS) if quick else (SIZES, ROUNDS)
    with tempfile.TemporaryDirectory(prefix="journal-") as folder:
        makers = made(Path(folder), sizes)
        starts = {name: partial(start, maker.run_dir) for name, maker in makers.items()}
        found = alternate(starts, rounds)
        largest = makers[name_of("compacted", sizes[-1])]
        back_s = [go_back(largest.run_dir) for _ in range(rounds)]
        metrics: dict[str, Any] = {name: figures_of(makers[name], starts) for name, starts in found.items()}
    metrics["back_s"] = Spread.of(back_s)
    least, most = (found[name_of("compacted", size)] for size in (sizes[0], sizes[-1]))
    grown_mb = [b["peak_rss_mb"] - a["peak_rss_mb"] for a, b in zip(least, most, strict=True)]
    return Result(
        name="journal",
        seed=0,
        settings={"quick": quick, "sizes": sizes},
        rounds=rounds,
        metrics={name: figures for name, figures in metrics.items() if not name.startswith("entries")},
        baselines={name: figures for name, figures in metrics.items() if name.startswith("entries")},
        bars=(
            at_most("start_s", WANTED_S, median_interval([one["start_s"] for one in most])),
            at_most("rss_growth_mb", WANTED_MB, median_interval(grown_mb)),
        ),
    )


def name_of(arm: str, size: int) -> str:
    return f"{arm}_{size}"


def made(folder: Path, sizes: tuple[int, ...]) -> dict[str, JournalMaker]:
    makers = {name_of("compacted", size): (size, True) for size in sizes}
    makers |= {name_of("entries", size): (size, False) for size in sizes if size <= MOST_ENTRIES}
    journals: dict[str, JournalMaker] = {}
    for name, (size, is_compacted) in makers.items():
        journals[name] = JournalMaker(folder / name, is_compacted)
        journals[name].grow(size)
        say(f"{name} is made")
    return journals


def start(run_dir: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.support.journal_start", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    say(f"{run_dir.name}: {figures}")
    return figures


def go_back(run_dir: Path) -> float:
    progress = RunHistory(run_dir, LIMITS).progress
    began_s = time.perf_counter()
    progress_up_to(DirectoryObjects(run_dir), progress, progress.watermark - BACK_STEPS)
    return time.perf_counter() - began_s


def figures_of(maker: JournalMaker, starts: list[dict[str, float]]) -> dict[str, Any]:
    files = list((maker.run_dir / "journal").iterdir())
    figures: dict[str, Any] = {
        "start_s": Spread.of([one["start_s"] for one in starts]),
        "peak_rss_mb": Spread.of([one["peak_rss_mb"] for one in starts]),
        "objects": len(files),
        "megabytes": sum(file.stat().st_size for file in files) / 2**20,
    }
    if maker.compaction_s:
        figures["compaction_s"] = Spread.of([whole for whole, _ in maker.compaction_s])
        figures["longest_call_s"] = max(longest for _, longest in maker.compaction_s)
    return figures


if __name__ == "__main__":
    run(__doc__, measure)
