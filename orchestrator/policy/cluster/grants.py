"""Grants of workers to runs, from their shares of the cluster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.protocol.scaling import Grant, ScalingView

FREED_S = 5.0  # resources of a failed worker show as free within this
FREEING_S = 1.0  # a run that ends frees its places one after another, within this


@dataclass(frozen=True)
class FairShare:
    """A run's number of places, standbys included, and the grant that follows from it."""

    places: int
    grant: Grant


@dataclass(frozen=True)
class NewGrant:
    """A change of a run's number of workers, or of its reason to wait, to apply once the same decision has held for
    `patience_s`; None: at once."""

    run_id: str
    grant: Grant
    patience_s: float | None


def new_grants(runs: Sequence[ScalingView], shares: Mapping[str, FairShare]) -> tuple[NewGrant, ...]:
    """The changed grants. Runs that lose places come first: releasing takes longer than starting a worker. A place that
    was lost, or that another run wants, has to be missing for a while, unless a run is admitted. A run that trains and
    may have more, but not yet all that it wants, waits a moment for the rest, so that it grows only once."""
    lets_in = any(run.queued_s is not None and shares[run.run_id].places for run in runs)
    found: list[NewGrant] = []
    for run in runs:
        grant = shares[run.run_id].grant
        waits_on = grant.workers == 0 and grant.why != run.grant.why
        if grant.workers == run.grant.workers and not waits_on:
            continue
        patience_s: float | None = 0.0
        if _is_less(grant, run):
            patience_s = 0.0 if lets_in else FREED_S
        elif run.grant.workers and grant.workers is not None:
            patience_s = FREEING_S
        elif len(runs) == 1:  # free places can't be meant for another run
            patience_s = None
        found.append(NewGrant(run.run_id, grant, patience_s))
    known = {run.run_id: run for run in runs}
    return tuple(sorted(found, key=lambda new: not _is_less(new.grant, known[new.run_id])))


def _is_less(grant: Grant, run: ScalingView) -> bool:
    """Whether the grant is less than the run may hold now."""
    return grant.workers is not None and run.grant.of(grant.workers + 1) > grant.workers
