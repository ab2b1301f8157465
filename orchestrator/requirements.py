"""Python packages that a job needs beside those of its environment (`pip` in the job file).

They are installed once per node, by pip, in a directory of their own that a job's processes put on their path. pip sees
the environment's packages there as installed, and keeps their versions: processes of the job have loaded them already.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.storage.backends.home import home

log = logging.getLogger("orchestrator")

TIMEOUT_S = 1800.0
SHOWN_LINES = 12  # of what pip writes about a failure
# Words of pip about what is wrong with requirements, rather than with a node, its network or an index.
OF_THE_JOB = ("ResolutionImpossible", "No matching distribution found", "Invalid requirement", "is not a valid wheel")
OF_THE_NETWORK = "Retrying (Retry("
# Variables that would have pip install elsewhere, or see other packages.
LEFT_OUT = ("PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_ROOT")

_used: list[Path] = []  # by this process


def use_requirements(requirements: Sequence[str]) -> None:
    """Make the packages importable in this process, installing them first if this node lacks them.

    Args:
        requirements: as pip takes them (PEP 508).

    Raises:
        UsageError: there are no such packages, or only with other versions of packages that the environment has.
        OrchestratorError: pip can't install them here.
    """
    if requirements:
        packages = installed(requirements)
        site.addsitedir(str(packages))
        sys.path.remove(str(packages))
        sys.path.insert(0, str(packages))
        _used.append(packages)


def used_versions() -> list[str]:
    """The packages that this process has from a job, each as NAME==VERSION."""
    return _versions([str(packages) for packages in _used])


def installed(requirements: Sequence[str], env: Mapping[str, str] | None = None) -> Path:
    """The directory with the packages, on this node. Raises as `use_requirements`.

    Args:
        env: variables for pip, such as PIP_INDEX_URL, beside this process's.
    """
    present = _versions([*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    made_of = [sorted(requirements), _files(requirements), sys.version, sysconfig.get_platform(), sys.prefix, present]
    name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    directory = home() / "pip" / name
    try:
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            with (directory.parent / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # of processes that may install the same
                if not directory.exists():
                    _install(requirements, present, directory, {**os.environ, **(env or {})})
    except OSError as error:
        raise OrchestratorError(
            f"packages can't be installed in {directory}: {error}",
            remedy="Free space, or set ORCHESTRATOR_HOME to a directory that can be written, on every node.",
        ) from error
    return _packages(directory)


def _packages(directory: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(directory), "platbase": str(directory)}))


def _versions(directories: Sequence[str]) -> list[str]:
    """The distributions in these directories, but for remains of ones that were removed."""
    found = importlib.metadata.distributions(path=list(dict.fromkeys(directories)))
    known = {(package.metadata["Name"], package.metadata["Version"]) for package in found if package.metadata}
    return sorted(f"{name}=={version}" for name, version in known if name and version and not name.startswith("~"))


def _files(requirements: Sequence[str]) -> list[str]:
    """Digests of the files that requirements name: a file that was rebuilt under the same name counts as another."""
    urls = [urlsplit(Requirement(requirement).url or "") for requirement in requirements]
    files = [Path(unquote(url.path)) for url in urls if url.scheme == "file"]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()]


def _install(requirements: Sequence[str], present: Sequence[str], directory: Path, env: Mapping[str, str]) -> None:
    """Install into a new directory, which gets its name once it is whole: a process that is killed leaves none."""
    if importlib.util.find_spec("pip") is None:
        raise OrchestratorError(
            f"the job names packages, {', '.join(requirements)}, and this environment has no pip",
            remedy="Install pip in the environment of every node, or the packages themselves, and leave pip out.",
        )
    began_s = time.monotonic()
    print(f"pip installs {', '.join(requirements)}", file=sys.stderr, flush=True)
    partial = Path(tempfile.mkdtemp(prefix=".", dir=directory.parent))
    try:
        venv.create(partial, with_pip=False, symlinks=True)
        places = dict.fromkeys((*site.getsitepackages(), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (_packages(partial) / "environment.pth").write_text("".join(f"{place}\n" for place in places))
        (partial / "constraints.txt").write_text("\n".join(present) + "\n")
        _run_pip(requirements, partial, {key: value for key, value in env.items() if key not in LEFT_OUT})
        here = {canonicalize_name(package.partition("==")[0]) for package in _versions([str(_packages(partial))])}
        named = [Requirement(requirement) for requirement in requirements]
        hidden = [each.name for each in named if each.url and canonicalize_name(each.name) not in here]
        if hidden:
            raise _refused(requirements, f"the environment has {', '.join(hidden)} in this version already")
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("pip installed %s in %.0f s: %s", ", ".join(requirements), time.monotonic() - began_s, directory)


def _run_pip(requirements: Sequence[str], venv_dir: Path, env: Mapping[str, str]) -> None:
    command = [sys.executable, "-P", "-m", "pip", "--python", str(venv_dir / "bin" / "python"), "install", "--no-user"]
    command += ["--disable-pip-version-check", "--no-input", "--constraint", str(venv_dir / "constraints.txt")]
    with subprocess.Popen(
        [*command, "--", *requirements],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(env),
        start_new_session=True,  # pip starts itself again, and both end together
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise _failed(requirements, f"it was not done after {TIMEOUT_S:.0f} s") from None
            raise
    if process.returncode != 0:
        lines = "\n".join([line for line in output.splitlines() if line.strip()][-SHOWN_LINES:])
        if any(words in output for words in OF_THE_JOB) and OF_THE_NETWORK not in output:
            raise _refused(requirements, lines)
        raise _failed(requirements, lines)


def _refused(requirements: Sequence[str], why: str) -> UsageError:
    return UsageError(
        f"pip can't install {', '.join(requirements)}: {why}",
        remedy="Correct pip in the job. Packages that the environment has keep their versions.",
        unchanged="The environment is as it was.",
    )


def _failed(requirements: Sequence[str], why: str) -> OrchestratorError:
    return OrchestratorError(
        f"pip could not install {', '.join(requirements)} here: {why}",
        remedy="Look at this node's network and disk, or install the packages in the environment of every node.",
        unchanged="The environment is as it was.",
    )
