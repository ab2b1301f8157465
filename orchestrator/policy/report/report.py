"""Report on a run's costs and results: time, workers, energy, tokens, operations, money. Pure.

    report_of("books", entries, gpus_per_worker=0, size=None, rates=Rates())

Figures that the journal lacks are None, never an estimate that looks like a measurement.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.errors import NotFinished, UsageError
from orchestrator.policy.estimate.flops import Flops, ModelSize, flops_of
from orchestrator.policy.report.attempts import Attempt, attempts_of
from orchestrator.policy.report.energy import NOT_MEASURED, Energy, energy_of
from orchestrator.policy.report.goodput import PRODUCTIVE, Slice, TransitionTime, Use, account_of
from orchestrator.policy.report.worker_hours import Headcount, WorkerHours, headcounts_of, worker_hours
from orchestrator.protocol.events.base import JournalEntry

MOVED = (Use.TRANSFER, Use.REBUILD)


@dataclass(frozen=True)
class Rates:
    """Cost of a worker-hour, in any currency, and power of a worker in watts; None where unknown.

    Raises:
        UsageError: one is negative or not finite.
    """

    cost_per_worker_hour: float | None = None
    watts_per_worker: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("cost per worker-hour", self.cost_per_worker_hour), ("power", self.watts_per_worker)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(
                    f"a worker's {name} is {value}; it must be a number of 0 or more",
                    remedy="Give --cost-per-worker-hour and --watts-per-worker such a number, or leave them out.",
                    unchanged="Nothing was written.",
                )


@dataclass(frozen=True)
class Span:
    """Begin and end of an attempt (`time.time()`), and its outcome, empty where no end is known."""

    began_s: float
    ended_s: float
    outcome: str


@dataclass(frozen=True)
class Spent:
    """Seconds of one use. None: not measured, and `note` names the use that includes them; a note beside seconds
    names the part that is missing."""

    use: Use
    seconds: float | None
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Cost of all hours of all workers held, in the currency of the price; None without a price, or tokens."""

    total: float | None
    per_million_tokens: float | None


@dataclass(frozen=True)
class RunReport:
    """Figures of a run.

    Args:
        outcome: of the newest attempt.
        elapsed_s: length of all attempts together; the parts of `time` add up to it.
        queued_s: time in the queue, before attempts.
        paused_s: between attempts, after a pause; `down_s` after any other end.
        goodput: share of `elapsed_s` spent computing and communicating in steps that count.
        steps: number that count: not done again later, and their update was made. `wasted_steps` are the others in the
            journal.
        tokens: target tokens of the steps that count.
        energy: by method; if empty, `energy_note` gives the reason.
        loss, validation_loss: the newest.
        flops: if None, `flops_note` gives the reason.
        headcounts: numbers of workers over time.
    """

    run_id: str
    outcome: str
    attempts: tuple[Span, ...]
    elapsed_s: float
    queued_s: float
    paused_s: float
    down_s: float
    goodput: float | None
    time: tuple[Spent, ...]
    workers: WorkerHours
    energy: tuple[Energy, ...]
    energy_note: str
    steps: int
    wasted_steps: int
    tokens: int
    wasted_tokens: int
    tokens_per_second: float | None
    loss: float | None
    validation_loss: float | None
    flops: Flops | None
    flops_note: str
    cost: Cost
    transitions: tuple[TransitionTime, ...]
    headcounts: tuple[Headcount, ...]

    def seconds(self, use: Use) -> float:
        """Seconds of a use; 0 where not measured."""
        return next((spent.seconds or 0.0 for spent in self.time if spent.use is use), 0.0)


def report_of(
    run_id: str,
    entries: Sequence[JournalEntry],
    *,
    gpus_per_worker: float = 0.0,
    size: ModelSize | None = None,
    size_note: str = "",
    rates: Rates | None = None,
) -> RunReport:
    """The report of a run, ended or running.

    Args:
        entries: all of its journal, the controller's own included.
        size: of its model; None if unknown, with the reason in `size_note`.

    Raises:
        NotFinished: the journal is empty.
    """
    rates = rates or Rates()
    attempts = attempts_of(entries)
    if not attempts:
        raise NotFinished(
            f"the journal of run {run_id} holds no event yet: there is nothing to report",
            remedy=f"`orchestrator status {run_id}` shows what it waits for.",
            unchanged="Nothing was written.",
        )
    accounts = [account_of(attempt) for attempt in attempts]
    slices = [part for parts, _ in accounts for part in parts]
    transitions = tuple(transition for _, moved in accounts for transition in moved)
    headcounts = tuple(count for attempt in attempts for count in headcounts_of(attempt))
    hours = worker_hours(headcounts, math.fsum(part.seconds * part.workers for part in slices), gpus_per_worker)
    energy = energy_of(attempts, hours.held, rates.watts_per_worker)
    elapsed_s = math.fsum(attempt.ended_s - attempt.began_s for attempt in attempts)
    done = [record for attempt in attempts for record in attempt.steps]
    counted = [record for attempt in attempts for record in attempt.steps if attempt.counts(record)]
    kept = [record for attempt in attempts for record in attempt.steps if record.step <= attempt.counts_to]
    tokens = sum(record.batch.tokens for record in counted)
    productive_s = math.fsum(part.seconds for part in slices if part.use in PRODUCTIVE)
    validations = [r.validation_loss for r in kept if r.validation_loss is not None]
    paused_s, down_s = _between(attempts)
    return RunReport(
        run_id=run_id,
        outcome=attempts[-1].outcome,
        attempts=tuple(Span(attempt.began_s, attempt.ended_s, attempt.outcome) for attempt in attempts),
        elapsed_s=elapsed_s,
        queued_s=math.fsum(attempt.began_s - attempt.asked_s for attempt in attempts),
        paused_s=paused_s,
        down_s=down_s,
        goodput=productive_s / elapsed_s if elapsed_s else None,
        time=_spent(attempts, slices, transitions),
        workers=hours,
        energy=energy,
        energy_note="" if energy else NOT_MEASURED,
        steps=len(counted),
        wasted_steps=len(done) - len(counted),
        tokens=tokens,
        wasted_tokens=sum(record.batch.tokens for record in done) - tokens,
        tokens_per_second=tokens / elapsed_s if elapsed_s else None,
        loss=kept[-1].loss if kept else None,
        validation_loss=validations[-1] if validations else None,
        flops=flops_of(size, counted) if size is not None else None,
        flops_note=size_note,
        cost=_cost(hours, rates, tokens),
        transitions=transitions,
        headcounts=headcounts,
    )


def _spent(
    attempts: Sequence[Attempt], slices: Sequence[Slice], transitions: Sequence[TransitionTime]
) -> tuple[Spent, ...]:
    """Seconds by use, with notes on those that are unknown or incomplete."""
    counted = [record for attempt in attempts for record in attempt.steps if attempt.counts(record)]
    silent_steps = sum(record.timing.communication_wait_s is None for record in counted)
    silent_transitions = sum(transition.transfer_s is None for transition in transitions)
    spent = []
    for use in Use:
        seconds: float | None = math.fsum(part.seconds for part in slices if part.use is use)
        note = ""
        if use is Use.COMMUNICATION:
            seconds, note = _as_known(seconds, silent_steps, len(counted), "steps", Use.COMPUTE)
        elif use in MOVED:
            seconds, note = _as_known(seconds, silent_transitions, len(transitions), "transitions", Use.RENDEZVOUS)
        spent.append(Spent(use, seconds, note))
    return tuple(spent)


def _as_known(seconds: float | None, silent: int, among: int, what: str, instead: Use) -> tuple[float | None, str]:
    if not silent:
        return seconds, ""
    if silent == among:
        return None, f"in {instead}"
    return seconds, f"of {among - silent} of {among} {what}; that of the others is in {instead}"


def _between(attempts: Sequence[Attempt]) -> tuple[float, float]:
    """Seconds between attempts: after a pause, after any other end."""
    gaps = [
        (before.outcome == "paused", max(0.0, after.asked_s - before.ended_s)) for before, after in pairwise(attempts)
    ]
    return math.fsum(s for paused, s in gaps if paused), math.fsum(s for paused, s in gaps if not paused)


def _cost(hours: WorkerHours, rates: Rates, tokens: int) -> Cost:
    price = rates.cost_per_worker_hour
    if price is None:
        return Cost(None, None)
    total = price * hours.held
    return Cost(total, total / tokens * 1e6 if tokens else None)
