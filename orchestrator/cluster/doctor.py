"""Checks of this machine's fitness for runs, one subject at a time. Changes nothing, starts nothing."""

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from orchestrator.cluster import local
from orchestrator.cluster.connection import probe
from orchestrator.errors import OrchestratorError
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location
from orchestrator.storage.backends.probe import access_error, check_storage

DISTRIBUTION = "elastic-orchestrator"
NEEDED_GIB = 4  # two workers of a small model, and Ray
NEEDED_DISK_GIB = 2
LEFT_BY_RAY = Path("/tmp/ray/ray_current_cluster")  # Ray joins the cluster that it names, alive or not


class Verdict(StrEnum):
    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """Result of one check; `remedy` is empty where all is well."""

    subject: str
    verdict: Verdict
    text: str
    remedy: str = ""


def examine(storage: Location) -> Iterator[Finding]:
    """Run all checks.

    Args:
        storage: where runs are to be stored; it need not exist yet.
    """
    yield _python()
    yield _packages()
    yield _memory()
    yield _directory(storage) if isinstance(storage, Path) else _bucket(storage)
    yield _cluster()
    yield _leftover()


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", Verdict.OK, f"{found}, {os.cpu_count()} cores")


def _packages() -> Finding:
    wrong, right = [], []
    for text in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            right.append(f"{requirement.name} {version}")
        else:
            wrong.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    if wrong:
        return Finding("packages", Verdict.FAULT, "; ".join(wrong), "Install again, with -c constraints.txt.")
    shown = [text for text in right if text.split()[0] in ("ray", "torch", "deepspeed", "mlflow")]
    return Finding("packages", Verdict.OK, ", ".join(shown))


def _memory() -> Finding:
    free_gib = psutil.virtual_memory().available / 2**30
    if free_gib < NEEDED_GIB:
        text = f"{free_gib:.1f} GiB free; two workers and Ray need about {NEEDED_GIB}"
        return Finding("memory", Verdict.WARNING, text, "End other processes, or run fewer workers.")
    return Finding("memory", Verdict.OK, f"{free_gib:.1f} GiB free")


def _bucket(storage: BucketUrl) -> Finding:
    try:
        check_storage(storage)
    except OSError as error:
        refused = access_error(storage, error)
        return Finding("storage", Verdict.FAULT, refused.message, refused.remedy)
    except OrchestratorError as error:
        return Finding("storage", Verdict.FAULT, error.message, error.remedy)
    return Finding("storage", Verdict.OK, f"{storage}: objects are created once, read, listed and deleted")


def _directory(storage: Path) -> Finding:
    place = storage.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return Finding("storage", Verdict.FAULT, f"{place} can't be written", "Name another: storage in the job file.")
    free_gib = shutil.disk_usage(place).free / 2**30
    if free_gib < NEEDED_DISK_GIB:
        text = f"{free_gib:.1f} GiB free at {place}; a run with checkpoints may need more"
        return Finding("storage", Verdict.WARNING, text, "Make room, or name another storage in the job file.")
    return Finding("storage", Verdict.OK, f"{free_gib:.1f} GiB free at {place}")


def _cluster() -> Finding:
    record = local.status()
    address = os.environ.get("RAY_ADDRESS") or (record.address if record else None)
    if address is None:
        return Finding("cluster", Verdict.OK, "none; `orchestrator run` starts its own, `cluster up` one that stays")
    try:
        probe(address)
    except OrchestratorError as error:
        named = "RAY_ADDRESS names it: unset it, or correct it." if os.environ.get("RAY_ADDRESS") else error.remedy
        return Finding("cluster", Verdict.FAULT, error.message, named)
    kind = "this machine's own" if record is not None and record.address == address else "named by RAY_ADDRESS"
    return Finding("cluster", Verdict.OK, f"{address} answers, {kind}")


def _leftover() -> Finding:
    try:
        address = LEFT_BY_RAY.read_text().strip()
    except OSError:
        return Finding("leftovers", Verdict.OK, "none")
    try:
        probe(address)
    except OrchestratorError:
        text = f"{LEFT_BY_RAY} names a cluster at {address} that doesn't answer; ray.init() without an address joins it"
        return Finding("leftovers", Verdict.WARNING, text, "Remove the file. orchestrator itself never reads it.")
    return Finding("leftovers", Verdict.OK, f"another Ray runs at {address}; orchestrator leaves it alone")
