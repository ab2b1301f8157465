"""Stalls of rescales and of recoveries beside those of older commits, in alternation in one call.

    python -m benchmarks.stalls [--quick] [--rescale-against COMMIT] [--recovery-against COMMIT]

An arm is a commit: the working tree as it is, or an older commit in a git worktree that is made for the call. Each
block starts a local cluster and one run with that commit's own `orchestrator`, in processes of its own
(`benchmarks.support.stall_driver`), measures some stalls, and ends it. Blocks take turns, A B B A. All arms have the
same job, that of `benchmarks.rescale` or `benchmarks.recovery`, with the defaults of their commit. 1aebb70 takes no
snapshots, so rescales without them are compared with its own; `protected`, an arm beside them, has the default.

`-` in place of a commit leaves that part out.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import recovery, rescale
from benchmarks.harness import ROOT, Bar, Result, Spread, alternate, at_most, median_ratio_interval, run, say
from benchmarks.support.data import data_spec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.old_keys import OLD_KEYS

RESCALES_OF, RECOVERIES_OF = "1aebb70", "f9f86ac"  # the last commits whose README shows stalls within the bars
WORST_RATIO = 1.10
LEFT_OUT = "-"
# The arms of the working tree: (tree, keys that its job has beside those of the old one). The first is compared.
NOW: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {
    "rescale": {"now": (ROOT, {"protection": {"every": "none"}}), "protected": (ROOT, {})},
    "recovery": {"now": (ROOT, {})},
}
DRIVER = Path("benchmarks/support/stall_driver.py")
DRIVER_OF_OLDER = "24c21aa"  # its driver imports only names that have been there since 1aebb70


@dataclass(frozen=True)
class Size:
    """How much is measured: blocks of each arm, and rounds of the cycle or kills in a block."""

    blocks: int
    cycles: int
    kills: int


FULL = Size(blocks=2, cycles=3, kills=10)
QUICK = Size(blocks=1, cycles=1, kills=1)


@dataclass(frozen=True)
class Stall:
    """One stall: `kind` is `2 -> 4` and the like, or `sigkill`; `step_s` what a step of the new world takes."""

    kind: str
    stall_s: float
    step_s: float


def measure(quick: bool, rescale_against: str, recovery_against: str) -> Result:
    size, against = QUICK if quick else FULL, {"rescale": rescale_against, "recovery": recovery_against}
    against = {what: commit for what, commit in against.items() if commit != LEFT_OUT}
    found: dict[str, dict[str, list[Stall]]] = {}
    with tempfile.TemporaryDirectory(prefix="stalls-") as folder:
        for what, commit in against.items():
            with checked_out(commit, Path(folder)) as old:
                arms = {"old": (old, {}), **NOW[what]}
                blocks = {
                    name: partial(block, what, tree, keys, Path(folder) / f"{what}-{name}", size, quick)
                    for name, (tree, keys) in arms.items()
                }
                found[what] = in_turn(blocks, size.blocks)
    metrics = {what: figures_of(arms) for what, arms in found.items()}
    return Result(
        name="stalls",
        seed=0,
        settings={"quick": quick, "against": against} | vars(size),
        rounds=size.blocks,
        metrics=metrics,
        baselines={what: figures["old"] for what, figures in metrics.items()},
        bars=tuple(bar_of(what, figures) for what, figures in metrics.items()),
    )


@contextmanager
def checked_out(commit: str, workspace: Path) -> Iterator[Path]:
    """A worktree of the commit, removed on leaving. Raises CalledProcessError where git doesn't have it."""
    tree = workspace / f"tree-{commit}"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def in_turn(arms: Mapping[str, Callable[[], list[Stall]]], blocks: int) -> dict[str, list[Stall]]:
    return {name: [stall for part in parts for stall in part] for name, parts in alternate(arms, blocks).items()}


def block(what: str, tree: Path, keys: dict[str, Any], folder: Path, size: Size, quick: bool) -> list[Stall]:
    """Start the tree's product, measure, end it. RuntimeError if another tree's product was measured."""
    storage = folder / "runs"
    storage.mkdir(parents=True, exist_ok=True)  # kept from block to block: data is prepared once per commit
    home = tempfile.mkdtemp(prefix="home-", dir=folder)
    number = len(list(folder.glob("home-*")))
    job = job_of(what, storage, folder, quick)
    order = {
        "job": as_of(tree, job) | keys | {"name": f"{job['name']}-{number}"},  # a name is used once per storage
        "home": home,
        "num_cpus": rescale.LARGEST + 2,
        "cycle": rescale.CYCLE,
        "count": size.cycles if what == "rescale" else size.kills,
        "seed": number,  # the n-th blocks of both arms have the same
    }
    done = subprocess.run(
        [sys.executable, "-P", str(driver_of(tree, folder)), what, json.dumps(order)],
        cwd=tree,
        env=environment(tree),
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    answer = json.loads(done.stdout.splitlines()[-1])
    if Path(answer["package"]) != tree / "orchestrator":
        raise RuntimeError(f"the product in {answer['package']} was measured; it was to be the one in {tree}")
    stalls = [Stall(**stall) for stall in answer["stalls"]]
    say(f"{what}, {folder.name}: " + ", ".join(f"{stall.kind} {stall.stall_s:.2f} s" for stall in stalls))
    return stalls


def driver_of(tree: Path, folder: Path) -> Path:
    """The tree's own driver, which has its commit's names; in `folder` that of `DRIVER_OF_OLDER` if it has none."""
    if (tree / DRIVER).exists():
        return tree / DRIVER
    source = subprocess.run(
        ["git", "-C", str(ROOT), "show", f"{DRIVER_OF_OLDER}:{DRIVER}"], check=True, stdout=subprocess.PIPE
    ).stdout
    driver = folder / DRIVER.name
    driver.write_bytes(source)
    return driver


def environment(tree: Path) -> dict[str, str]:
    """That of this process without what it has of Ray, so that every cluster starts as a user's does."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "ORCHESTRATOR_"))}
    return clean | {"PYTHONPATH": str(tree)}


def job_of(what: str, storage: Path, folder: Path, quick: bool) -> dict[str, Any]:
    """The content of a job file that every commit reads: only what the job sets, not the defaults of today."""
    data = data_spec(quick, folder)
    job: JobSpec
    if what == "rescale":
        job = rescale.job_of("elastic", rescale.LARGEST, data, storage, quick)
    else:
        job = recovery.job_of(data, storage, quick)
    return job.model_dump(mode="json", by_alias=True, exclude_unset=True)


def as_of(tree: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The job with keys that the tree knows: those of before there was an `old_keys.py`, or ours."""
    if next((tree / "orchestrator" / "spec").rglob("old_keys.py"), None) is not None:
        return job
    former = {new: old for old, new in OLD_KEYS.items()}

    def key_of(section: str, key: str) -> str:
        return former.get(f"{section}.{key}", key).rpartition(".")[2]

    return {
        section: {key_of(section, key): value for key, value in part.items()} if isinstance(part, dict) else part
        for section, part in job.items()
    }


def figures_of(arms: dict[str, list[Stall]]) -> dict[str, Any]:
    """`ratio` and, of other arms of the working tree, `ratio NAME`; and each arm's own figures."""
    ratios = {
        "ratio" if name == "now" else f"ratio {name}": median_ratio_interval(by_kind(stalls), by_kind(arms["old"]))
        for name, stalls in arms.items()
        if name != "old"
    }
    return ratios | {name: summary_of(stalls) for name, stalls in arms.items()}


def summary_of(stalls: list[Stall]) -> dict[str, Any]:
    return {
        "stalls": len(stalls),
        "stall_s": Spread.of([stall.stall_s for stall in stalls]),
        "step_s": Spread.of([stall.step_s for stall in stalls]),
        "by_kind": {kind: Spread.of(stalls_s) for kind, stalls_s in by_kind(stalls).items()},
    }


def by_kind(stalls: list[Stall]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for stall in stalls:
        found.setdefault(stall.kind, []).append(stall.stall_s)
    return found


def bar_of(what: str, figures: dict[str, Any]) -> Bar:
    return at_most(f"{what}_stall_ratio", WORST_RATIO, figures["ratio"])


if __name__ == "__main__":
    run(__doc__, measure, {"rescale-against": RESCALES_OF, "recovery-against": RECOVERIES_OF})
