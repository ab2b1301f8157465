"""PromQL over the metrics that runs export. Names come from the registry: one that isn't declared there is an error.

A controller that Ray has started again is another series of the same run for some seconds, hence `max by (run)`.
"""

from orchestrator.metrics.metric import MetricKind
from orchestrator.metrics.registry import metric

RUNS = 'run=~"$run"'  # those chosen in the dashboard
INTERVAL = "$__rate_interval"


def series(name: str, selector: str = "") -> str:
    """The metric `train/loss` as Prometheus knows it: Ray puts `ray_` before all names. Raises NotFound."""
    found = f"ray_{metric(name).prometheus}"
    return f"{found}{{{selector}}}" if selector else found


def newest(name: str, selector: str = "", by: str = "run") -> str:
    """The newest value, per run or by other labels. Raises NotFound."""
    return f"max by ({by}) ({series(name, selector)})"


def mean(name: str, window: str, selector: str = "") -> str:
    """The mean of a gauge over a window, per run. Raises NotFound."""
    return f"max by (run) (avg_over_time({series(name, selector)}[{window}]))"


def rate(name: str, selector: str = RUNS, window: str = INTERVAL) -> str:
    """The rise per second, per run. Raises NotFound; ValueError if the metric doesn't add up."""
    if metric(name).kind is MetricKind.GAUGE:
        raise ValueError(f"{name} is a gauge: it has no rate")
    return f"sum by (run) (rate({series(name, selector)}[{window}]))"


def rise(name: str, window: str, selector: str = "") -> str:
    """By how much a counter has grown in a window, per run: exactly, and whichever of the run's controllers told it.

    Raises NotFound; ValueError if the metric is no counter, whose values a new controller continues.
    """
    if metric(name).kind is not MetricKind.COUNTER:
        raise ValueError(f"{name} is a {metric(name).kind}; only a counter's values are those of the whole run")
    whole = f"{series(name, selector)}[{window}]"
    return f"max by (run) (max_over_time({whole})) - min by (run) (min_over_time({whole}))"
