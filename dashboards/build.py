"""Writes what Grafana and Prometheus read: a JSON file per dashboard, and the alert rules.

    python -m dashboards.build      # after a change of orchestrator/metrics/registry.py or of this folder

`tests/unit/dashboards/test_build.py` fails while a file is older than the code.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import yaml
from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.builders import stat, timeseries
from grafana_foundation_sdk.builders.common import ReduceDataOptions, StackingConfig, VizLegendOptions
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from dashboards.alerts import ALERTS, Alert
from dashboards.panels import BOARDS, Board, Chart, Query
from dashboards.queries import series

DIRECTORY = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SPAN, HEIGHT, NUMBER_SPAN, NUMBER_HEIGHT = 12, 8, 6, 4  # of Grafana's grid, 24 wide
HEAD = "# Written by `python -m dashboards.build`; change dashboards/alerts.py, not this file.\n"


def dashboard(board: Board) -> str:
    """A dashboard as JSON, to be imported into Grafana. The data source is chosen there."""
    built = (
        boards.Dashboard(f"Orchestrator / {board.title}")
        .uid(f"orchestrator-{board.name}")
        .description(board.about)
        .tags(["orchestrator"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(boards.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    if board.chooses_runs:
        built = built.with_variable(_runs())
    for chart in board.charts:
        built = built.with_panel(_number(chart) if chart.number else _lines(chart))
    return JSONEncoder(sort_keys=True, indent=2).encode(built.build()) + "\n"


def rules() -> str:
    """All alerts as a rule file of Prometheus."""
    groups = [{"name": "orchestrator", "rules": [_rule(alert) for alert in ALERTS]}]
    return HEAD + yaml.safe_dump({"groups": groups}, sort_keys=False, width=1000, allow_unicode=True)


def _rule(alert: Alert) -> dict[str, object]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.lasting,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": f"{{{{ $labels.run }}}}: {alert.summary}", "description": alert.remedy},
    }


def _runs() -> boards.QueryVariable:
    return (
        boards.QueryVariable("run")
        .label("Run")
        .datasource(SOURCE)
        .query(f"label_values({series('run/committed_steps')}, run)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(VariableOption(text="All", value="$__all"))
    )


def _lines(chart: Chart) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(chart.title)
        .description(chart.about)
        .datasource(SOURCE)
        .unit(chart.unit)
        .span(SPAN)
        .height(HEIGHT)
        .show_points(common.VisibilityMode.NEVER)
        .legend(VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM))
    )
    if chart.stacked:
        panel = panel.stacking(StackingConfig().mode(common.StackingMode.NORMAL)).fill_opacity(20)
    for target in _targets(chart.queries):
        panel = panel.with_target(target)
    return panel


def _number(chart: Chart) -> stat.Panel:
    panel = (
        stat.Panel()
        .title(chart.title)
        .description(chart.about)
        .datasource(SOURCE)
        .unit(chart.unit)
        .span(NUMBER_SPAN)
        .height(NUMBER_HEIGHT)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    )
    for target in _targets(chart.queries):
        panel = panel.with_target(target)
    return panel


def _targets(queries: tuple[Query, ...]) -> list[Dataquery]:
    return [
        Dataquery().ref_id(chr(ord("A") + index)).expr(query.expr).legend_format(query.legend).datasource(SOURCE)
        for index, query in enumerate(queries)
    ]


FILES: Mapping[str, Callable[[], str]] = {
    **{f"{board.name}.json": partial(dashboard, board) for board in BOARDS},
    "alerts.yml": rules,
}


if __name__ == "__main__":
    for name, content in FILES.items():
        (DIRECTORY / name).write_text(content(), encoding="utf-8")
