"""What every benchmark shares: arms measured in turn, figures with their spread, bars, and the line of JSON at the end.

    measured = alternate({"ours": ours, "bare": bare}, rounds=10)
    interval = median_interval(ratios(measured["ours"], measured["bare"]))
    print_line(Result(name="overhead", ..., bars=(at_least("ratio", 0.97, interval),)))

Only the standard library, so that a baseline can use it wherever it runs.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, TypeVar

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
PACKAGES = ("ray", "torch", "deepspeed", "mlflow", "numpy")
CONFIDENCE = 0.95
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of Student's t, by degrees of freedom from 1

# -- measuring -------------------------------------------------------------------------------------------------------


def alternate(arms: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Measure each arm once a round: forwards in even rounds, backwards in odd ones, so two arms go A B B A.

    A machine that slowly gets faster or slower favours no arm that way, and the n-th values of all arms are neighbours.
    """
    measured: dict[str, list[T]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            measured[name].append(arms[name]())
    return measured


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, pair by pair."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


# -- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The middle of some values, and where four fifths of them lie."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(quantile(values, 0.5), quantile(values, 0.1), quantile(values, 0.9))


@dataclass(frozen=True)
class Interval:
    """A median and the bounds within which the true one lies."""

    median: float
    low: float
    high: float


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the values lie, interpolated linearly. Raises ValueError if there is none."""
    if not values:
        raise ValueError("a quantile of no values was asked for; it needs at least one")
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median with a confidence interval from order statistics, which assumes no distribution.

    The true median lies outside of the k-th smallest and k-th largest of n values with probability
    2 P(Binomial(n, 1/2) < k). The largest k that keeps this below 1 - `confidence` is taken; with fewer than 6 values
    there is none at 95 %, and the interval is all that was seen. Raises ValueError if there are no values.
    """
    ordered = sorted(values)
    n, outside, rank = len(ordered), 0.0, 1
    for k in range(1, n // 2 + 1):
        outside += 2.0 * math.comb(n, k - 1) / 2.0**n
        if outside > 1.0 - confidence:
            break
        rank = k
    return Interval(quantile(ordered, 0.5), ordered[rank - 1], ordered[n - rank])


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of a few values with its 95 % interval by Student's t, for pairs of runs that differ by their seed only.

    Raises ValueError for fewer than 2 values, or more than there are quantiles for.
    """
    n = len(values)
    if not 2 <= n <= len(T_975) + 1:
        raise ValueError(f"an interval of the mean of {n} values was asked for; it needs 2 to {len(T_975) + 1}")
    half = T_975[n - 2] * stdev(values) / math.sqrt(n)
    return Interval(fmean(values), fmean(values) - half, fmean(values) + half)


def median_ratio_interval(
    ours: Mapping[str, Sequence[float]],
    theirs: Mapping[str, Sequence[float]],
    confidence: float = CONFIDENCE,
    draws: int = 10_000,
) -> Interval:
    """The median of all our values over that of all of theirs, with a percentile bootstrap interval.

    Values come by kind, and each draw has as many of each kind as were measured: that a rescale to one worker takes
    longer than one to four is no chance. The draws are the same in every call. Raises ValueError without values.
    """
    chance = random.Random(0)

    def drawn(values: Mapping[str, Sequence[float]]) -> float:
        return median(value for some in values.values() for value in chance.choices(some, k=len(some)))

    middle = [median(value for some in values.values() for value in some) for values in (ours, theirs)]
    ratios_drawn = [drawn(ours) / drawn(theirs) for _ in range(draws)]
    outside = (1.0 - confidence) / 2.0
    return Interval(middle[0] / middle[1], quantile(ratios_drawn, outside), quantile(ratios_drawn, 1.0 - outside))


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """The slope of y over x as the median of the slopes of all pairs (Sen, 1968): single steps don't bend it.

    Raises ValueError where no two points differ in x.
    """
    slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in combinations(points, 2) if x1 != x0]
    if not slopes:
        raise ValueError(f"a slope through {len(points)} points was asked for; it needs two that differ in x")
    return median(slopes)


# -- bars ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A wanted figure beside the measured one. An interval meets the bar only where all of it does."""

    name: str
    wanted: str
    measured: Any
    met: bool


def at_least(name: str, bound: float, measured: float | Interval) -> Bar:
    low = measured.low if isinstance(measured, Interval) else measured
    return Bar(name, f">= {bound:g}", _plain(measured), low >= bound)


def at_most(name: str, bound: float, measured: float | Interval) -> Bar:
    high = measured.high if isinstance(measured, Interval) else measured
    return Bar(name, f"<= {bound:g}", _plain(measured), high <= bound)


def equals(name: str, wanted: bool | int, measured: bool | int) -> Bar:
    return Bar(name, f"== {json.dumps(wanted)}", measured, measured == wanted)


# -- the line --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a benchmark found. `metrics` and `baselines` may hold `Spread`s and `Interval`s."""

    name: str
    seed: int
    settings: Mapping[str, Any]
    rounds: int
    metrics: Mapping[str, Any]
    baselines: Mapping[str, Any] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()


def line_of(result: Result, duration_s: float) -> dict[str, Any]:
    """The result as the object that is printed, with what is needed to judge and to repeat it."""
    checked_out, dirty = commit()
    return {
        "name": result.name,
        "commit": checked_out,
        "dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "seed": result.seed,
        "settings": _plain(result.settings),
        "rounds": result.rounds,
        "duration_s": round(duration_s, 1),
        "metrics": _plain(result.metrics),
        "baselines": _plain(result.baselines),
        "bars": [asdict(bar) for bar in result.bars],
    }


def run(doc: str | None, measure: Callable[..., Result], options: Mapping[str, str] | None = None) -> None:
    """A benchmark's command line: measure, and print the line.

    Args:
        measure: called with whether it is a smoke run only, and with each of `options` by its name as an argument.
        options: further options of the command line, with their defaults.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run for tests; its figures mean nothing")
    for name, default in (options or {}).items():
        parser.add_argument(f"--{name}", default=default, help=f"{default} if it isn't given")
    given = vars(parser.parse_args())
    if given["quick"]:
        say("a smoke run: its figures mean nothing")
    began_s = time.monotonic()
    result = measure(**given)
    print(json.dumps(line_of(result, time.monotonic() - began_s), allow_nan=False), flush=True)


def say(text: str) -> None:
    """Progress, beside the result."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def _plain(value: Any) -> Any:
    """Dataclasses to dicts and figures to 6 digits."""
    if isinstance(value, Spread | Interval):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def commit() -> tuple[str | None, bool | None]:
    """The commit that is checked out, and whether files differ from it. None for both where git can't tell."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(changed.strip())


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
