import json
import math
import random

import pytest

from benchmarks.harness import (
    Bar,
    Interval,
    Result,
    Spread,
    alternate,
    at_least,
    at_most,
    equals,
    line_of,
    median_interval,
    median_ratio_interval,
    quantile,
    ratios,
    theil_sen,
)


def test_two_arms_go_a_b_b_a() -> None:
    order: list[str] = []

    def arm(name: str) -> float:
        order.append(name)
        return float(len(order))

    measured = alternate({"a": lambda: arm("a"), "b": lambda: arm("b")}, rounds=4)
    assert order == list("abbaabba")
    assert measured == {"a": [1, 4, 5, 8], "b": [2, 3, 6, 7]}


def test_three_arms_go_there_and_back() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: float(order.append(name) is None) for name in "abc"}
    alternate(arms, rounds=2)
    assert order == list("abccba")


def test_alternation_cancels_a_drift() -> None:
    clock = iter(range(100, 200))
    measured = alternate({"a": lambda: next(clock), "b": lambda: next(clock)}, rounds=10)
    assert sum(measured["a"]) == sum(measured["b"])


def test_a_ratio_of_medians_has_the_true_one_in_its_interval() -> None:
    chance = random.Random(3)

    def arm(scale: float) -> dict[str, list[float]]:
        return {
            kind: [scale * chance.gauss(mean, 0.02) for _ in range(40)] for kind, mean in (("up", 0.45), ("down", 0.5))
        }

    found = median_ratio_interval(arm(1.2), arm(1.0), draws=500)
    assert found.low < 1.2 < found.high
    assert found.low <= found.median <= found.high
    alike = arm(1.0)
    assert median_ratio_interval(alike, alike, draws=500).median == 1.0


def test_kinds_of_a_ratio_are_drawn_apart() -> None:
    ours, theirs = {"short": [1.0, 1.0], "long": [9.0, 9.0]}, {"short": [2.0, 2.0], "long": [8.0, 8.0]}
    assert median_ratio_interval(ours, theirs, draws=50) == Interval(1.0, 1.0, 1.0)


def test_ratios_need_pairs() -> None:
    assert ratios([2.0, 3.0], [4.0, 1.0]) == [0.5, 3.0]
    with pytest.raises(ValueError):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("fraction", "value"), [(0.0, 1.0), (0.5, 2.5), (1.0, 4.0), (0.1, 1.3)])
def test_quantiles_interpolate(fraction: float, value: float) -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], fraction) == pytest.approx(value)


def test_quantile_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one"):
        quantile([], 0.5)


def test_spread() -> None:
    assert Spread.of([float(n) for n in range(11)]) == Spread(5.0, 1.0, 9.0)


@pytest.mark.parametrize(
    ("n", "rank"),
    # From tables of the sign test at 95 %: the interval is from the rank-th smallest to the rank-th largest.
    [(3, 1), (6, 1), (9, 2), (10, 2), (12, 3), (20, 6)],
)
def test_median_interval_has_the_ranks_of_the_sign_test(n: int, rank: int) -> None:
    values = [float(value) for value in range(1, n + 1)]
    random.Random(0).shuffle(values)
    interval = median_interval(values)
    assert (interval.low, interval.high) == (rank, n + 1 - rank)
    assert interval.median == (n + 1) / 2


def test_median_interval_covers_the_median() -> None:
    chance = random.Random(1)
    intervals = [median_interval([chance.gauss(0.0, 1.0) for _ in range(10)]) for _ in range(2000)]
    covered = sum(i.low <= 0.0 <= i.high for i in intervals) / len(intervals)
    assert 0.96 < covered < 0.99  # 97.9 % at n = 10


def test_theil_sen_is_not_bent_by_a_jump() -> None:
    points = [(float(x), 2.0 * x + (500.0 if x == 7 else 0.0)) for x in range(20)]
    assert theil_sen(points) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="differ in x"):
        theil_sen([(1.0, 1.0), (1.0, 2.0)])


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (at_least("ratio", 0.97, 0.97), True),
        (at_least("ratio", 0.97, Interval(0.99, 0.97, 1.0)), True),
        (at_least("ratio", 0.97, Interval(0.99, 0.96, 1.0)), False),
        (at_most("stall", 0.5, Interval(0.4, 0.3, 0.5)), True),
        (at_most("stall", 0.5, Interval(0.4, 0.3, 0.6)), False),
        (at_most("stall", 0.5, math.inf), False),
        (equals("lost", 0, 0), True),
        (equals("identical", True, False), False),
    ],
    ids=lambda value: f"{value.name} {value.wanted} {value.measured}" if isinstance(value, Bar) else str(value),
)
def test_an_interval_across_the_bar_does_not_meet_it(bar: Bar, met: bool) -> None:
    assert bar.met is met


def test_the_line_has_every_field_and_is_json() -> None:
    interval = Interval(1.0, 0.5, 2.0)
    result = Result(
        name="try",
        seed=3,
        settings={"quick": True},
        rounds=2,
        metrics={"step_s": Spread(1 / 3, 0.1, 0.5), "n": 3},
        bars=(at_least("ratio", 0.97, interval), equals("identical", True, True)),
    )
    line = json.loads(json.dumps(line_of(result, duration_s=1.26), allow_nan=False))
    assert list(line) == [
        *("name", "commit", "dirty", "date", "cpu", "cores", "versions", "seed", "settings", "rounds", "duration_s"),
        *("metrics", "baselines", "bars"),
    ]
    assert line["duration_s"] == 1.3
    assert line["metrics"] == {"step_s": {"median": 0.333333, "p10": 0.1, "p90": 0.5}, "n": 3}
    assert line["bars"] == [
        {
            "name": "ratio",
            "wanted": ">= 0.97",
            "measured": {"median": 1.0, "low": 0.5, "high": 2.0},
            "met": False,
        },
        {"name": "identical", "wanted": "== true", "measured": True, "met": True},
    ]
    assert {"python", "ray", "torch", "deepspeed"} <= line["versions"].keys()
