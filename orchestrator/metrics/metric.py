"""A metric that a run publishes: its name, unit, kind and meaning."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class MetricKind(StrEnum):
    """Relation between the values of different steps."""

    GAUGE = "gauge"  # each value stands alone
    COUNTER = "counter"  # only grows within a run
    AMOUNT = "amount"  # of one step; the values of several steps add up


UNIX_S = "s since 1970"

# Prometheus wants base units as suffixes. By unit: suffix here, suffix in Prometheus, factor of the values.
_ENDINGS: Mapping[str, tuple[str, str, float]] = MappingProxyType(
    {
        "s": ("_s", "_seconds", 1.0),
        "%": ("_percent", "_ratio", 0.01),
        UNIX_S: ("_time", "_timestamp_seconds", 1.0),
    }
)


@dataclass(frozen=True)
class Metric:
    """One declared metric. `name` is `group/what`; a name of a duration or size ends in its unit.

    `label` distinguishes several values of one run. `live` metrics belong to a moment and not to a step: Prometheus has
    them, MLflow doesn't.
    """

    name: str
    unit: str
    kind: MetricKind
    meaning: str
    label: str = ""
    live: bool = False

    @property
    def prometheus(self) -> str:
        """The name in Prometheus, without Ray's prefix `ray_`. Amounts, and counters of things, end in `_total`."""
        own, theirs, _ = _ENDINGS.get(self.unit, ("", "", 1.0))
        stem = self.name.replace("/", "_").removesuffix(own) + theirs
        numbers_something = self.kind is MetricKind.COUNTER and self.unit == "1"
        total = "" if self.kind is MetricKind.GAUGE or numbers_something else "_total"
        return f"orchestrator_{stem}{total}"

    @property
    def factor(self) -> float:
        """Factor of values for Prometheus, where shares are of 1 and not of 100."""
        return _ENDINGS.get(self.unit, ("", "", 1.0))[2]
