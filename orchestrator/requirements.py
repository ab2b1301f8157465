"""Python packages that a job needs beside those of its environment (`pip` in the job file).

They are installed once per node, by pip, in a directory of their own that a job's processes put on their path. pip sees
the environment's packages there as installed, and keeps their versions: processes of the job have loaded them already.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import logging
import shutil
import site
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Sequence
from pathlib import Path

from orchestrator.errors import UsageError
from orchestrator.storage.backends.home import home

log = logging.getLogger("orchestrator")

TIMEOUT_S = 1800.0
SHOWN_LINES = 12  # of what pip writes about a failure


def use_requirements(requirements: Sequence[str]) -> None:
    """Make the packages importable in this process, installing them first if this node lacks them.

    Args:
        requirements: as pip takes them (PEP 508).

    Raises:
        UsageError: pip can't install them, or only with other versions of packages that the environment has.
    """
    if requirements:
        site.addsitedir(str(installed(requirements)))


def installed(requirements: Sequence[str]) -> Path:
    """The directory with the packages, on this node. Raises as `use_requirements`."""
    of_environment = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = importlib.metadata.distributions(path=of_environment)
    present = sorted({f"{package.name}=={package.version}" for package in found})
    made_of = json.dumps([sorted(requirements), sys.version, sys.prefix, present])
    directory = home() / "pip" / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(directory), "platbase": str(directory)}))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that may install the same
        if not (directory / "done").exists():
            began_s = time.monotonic()
            _install(requirements, present, directory, packages)
            (directory / "done").touch()
            log.info("pip installed %s in %.0f s: %s", ", ".join(requirements), time.monotonic() - began_s, directory)
    return packages


def _install(requirements: Sequence[str], present: Sequence[str], directory: Path, packages: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed
    venv.create(directory, with_pip=False, symlinks=True)
    places = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (packages / "environment.pth").write_text("".join(f"{place}\n" for place in places))
    (directory / "constraints.txt").write_text("\n".join(present) + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(directory / "bin" / "python"), "install"]
    command += ["--disable-pip-version-check", "--no-input", "--constraint", str(directory / "constraints.txt")]
    try:
        done = subprocess.run(
            [*command, "--", *requirements], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise _refused(requirements, f"it was not done after {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise _refused(requirements, "\n".join(lines[-SHOWN_LINES:]))


def _refused(requirements: Sequence[str], why: str) -> UsageError:
    return UsageError(
        f"pip can't install {', '.join(requirements)}: {why}",
        remedy="Correct pip in the job, or install the packages in the environment of every node. Packages that the "
        "environment has keep their versions.",
        unchanged="The environment is as it was.",
    )
