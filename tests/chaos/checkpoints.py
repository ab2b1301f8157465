"""Reader of checkpoints that shares no code with the product, and what retention promises of them.

RUN/checkpoints/NAME/manifest.json     {"sha256", "manifest": {tensors, files, step, …}}
RUN/checkpoints/NAME/….safetensors     as the manifest names them
RUN/journal/                           names them, with the digest of the manifest's file
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from tests.chaos.journal import Event

BLOCK_BYTES = 2**18  # each has a digest, in the header of its file


@dataclass(frozen=True)
class Named:
    """A checkpoint that a journal names. `name` is its directory's, `sha256` of its manifest's file."""

    step: int
    name: str
    sha256: str

    def path(self, run_dir: Path) -> Path:
        return run_dir / "checkpoints" / self.name


def faults_of(checkpoint: Path, sha256: str) -> list[str]:
    """What is wrong with a checkpoint: its manifest's and files' digests, the pieces of its tensors. FileNotFoundError
    if it, or a file of it, isn't there."""
    content = (checkpoint / "manifest.json").read_bytes()
    manifest = json.loads(content)["manifest"]
    faults = [] if hashlib.sha256(content).hexdigest() == sha256 else ["the manifest's digest differs"]
    for name, entry in manifest["files"].items():
        faults += [f"{name}: {fault}" for fault in _faults_of_file((checkpoint / name).read_bytes(), entry)]
    for name, tensor in manifest["tensors"].items():
        ends = [0, *(piece["stop"] for piece in tensor["pieces"])]
        starts = [*(piece["start"] for piece in tensor["pieces"]), math.prod(tensor["shape"])]
        if ends != starts:
            faults.append(f"{name}: pieces don't cover it once: {starts} and {ends}")
    return [f"{checkpoint.name}: {fault}" for fault in faults]


def tensors_of(checkpoint: Path) -> dict[str, NDArray[Any]]:
    """All tensors, flat."""
    tensors = json.loads((checkpoint / "manifest.json").read_bytes())["manifest"]["tensors"]
    found = {}
    for name, tensor in tensors.items():
        pieces = []
        for piece in tensor["pieces"]:
            with safe_open(checkpoint / piece["file"], framework="numpy") as file:
                pieces.append(file.get_tensor(piece["key"]))
        found[name] = np.concatenate(pieces)
    return found


def differing(tensors: dict[str, NDArray[Any]], others: dict[str, NDArray[Any]]) -> list[str]:
    """Names of tensors that are not equal bit by bit, or not in both."""
    return [
        name
        for name in sorted(tensors.keys() | others.keys())
        if name not in tensors or name not in others or tensors[name].tobytes() != others[name].tobytes()
    ]


def promised(events: Iterable[Event], keep_last: int) -> list[Named]:
    """The checkpoints that must be there, given a journal: the newest ones that were completed, and neither deleted nor
    given up, because a generation began at an earlier step."""
    named: list[Named] = []
    for event in events:
        if event["kind"] == "checkpoint":
            named = [one for one in named if one.step != event["step"]] + [_named(event)]
        elif event["kind"] == "checkpoints_deleted":
            named = [one for one in named if one.step not in event["steps"]]
        elif event["kind"] == "activated":
            named = [one for one in named if one.step <= event["step"]]
    return named[-keep_last:]


def broken_promises(run_dir: Path, checkpoints: Iterable[Named]) -> list[str]:
    """Which of these checkpoints are missing or damaged."""
    faults: list[str] = []
    for one in checkpoints:
        try:
            faults += faults_of(one.path(run_dir), one.sha256)
        except FileNotFoundError as error:
            faults.append(f"the checkpoint of step {one.step}: {error.filename} is missing")
    return faults


def garbage_in(run_dir: Path, events: Iterable[Event], num_killed: int) -> list[str]:
    """What a run must not leave in its storage: parts of checkpoints that its journal doesn't name, its reserve, and
    more files that were being written than processes were killed."""
    named: dict[str, int] = {}
    for event in events:
        if event["kind"] == "checkpoint":
            named[_named(event).name] = event["step"]
        elif event["kind"] == "checkpoints_deleted":
            newest = {step: name for name, step in named.items()}
            for step in event["steps"]:
                named.pop(newest.get(step, ""), None)
    left = [path.name for path in run_dir.glob("checkpoints/*") if path.name not in named]
    left += [path.name for path in run_dir.glob(".reserve")]
    partial = [str(path.relative_to(run_dir)) for path in run_dir.rglob(".*.partial")]
    return left + (partial if len(partial) > num_killed else [])


def _named(event: Event) -> Named:
    return Named(event["step"], PurePath(event["path"]).name, event["sha256"])


def _faults_of_file(data: bytes, entry: dict[str, Any]) -> list[str]:
    behind = 8 + int.from_bytes(data[:8], "little")
    if hashlib.sha256(data[:behind]).hexdigest() != entry["header_sha256"]:
        return ["the header's digest differs"]
    digests = [hashlib.sha256(data[at : at + BLOCK_BYTES]).hexdigest() for at in range(behind, len(data), BLOCK_BYTES)]
    return [] if json.loads(data[8:behind])["__metadata__"]["blocks"] == "".join(digests) else ["a digest differs"]
