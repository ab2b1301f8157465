"""Chaos: faults of processes and of storage, by seed, to a run of a local cluster of its own. Needs root, for mounts.

    python -m tests.chaos --seed 7 --faults 25
    python -m tests.chaos --seed 7 --faults 25 --disk fuse   its calls also fail or are slow
    python -m tests.chaos --seed 7 --faults 25 --dry-run     print the schedule only

Prints each fault as it happens, and in the end `N passed, N failed`. Exits with 1 if a check failed, with a line that
repeats the run.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.chaos.checks import Checks
from tests.chaos.schedule import PACES, Disk, schedule_of
from tests.chaos.suite import run_chaos


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--faults", type=int, default=25, help="at least half of them are of storage")
    parser.add_argument("--schedule", choices=PACES, default="long", help="time between faults, and how long they last")
    parser.add_argument(
        "--disk", type=Disk, choices=list(Disk), help="by the seed if it isn't given; fuse, removable: only so"
    )
    parser.add_argument("--patience", type=float, default=240.0, help="seconds until a run must have gone on")
    parser.add_argument("--place", type=Path, help="directory for all that is written, which stays. Default: in /tmp")
    parser.add_argument("--dry-run", action="store_true", help="print the schedule")
    args = parser.parse_args()
    schedule = schedule_of(args.seed, args.faults, PACES[args.schedule], args.disk)
    if args.dry_run:
        print(schedule)
        return 0
    if os.geteuid() != 0:
        parser.error("needs root, to mount file systems")
    checks = Checks(partial(print, flush=True))
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        place = args.place or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        try:
            run_chaos(schedule, checks, place, args.patience)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            checks.check("the suite gets to its end", [repr(error)])
    for failure in checks.failures:
        print(f"failed: {failure}")
    print(checks.summary())
    if checks.failures:
        disk = f" --disk {args.disk}" if args.disk else ""
        same = f"--seed {args.seed} --faults {args.faults} --schedule {args.schedule}{disk}"
        print(f"replay: python -m tests.chaos {same}")
    return 1 if checks.failures else 0


if __name__ == "__main__":
    sys.exit(main())
