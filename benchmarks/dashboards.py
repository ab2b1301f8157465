"""Whether every panel and every alert finds its samples: a real Prometheus scrapes a live run.

    python -m benchmarks.dashboards [--quick]

A run with experts on a local cluster of its own trains, is validated, writes checkpoints, is scaled and loses a worker.
Prometheus finds the cluster by the file that `orchestrator cluster up` leaves and has the alert rules loaded. Then each
query of `dashboards/*.json`, as the files are, is asked over Prometheus' HTTP API, and each alert's verdict. Debian's
package `prometheus` has both programs that are needed.

- `panels_with_samples`: panels of which every query returned a number. Grafana's variables are filled in as it would.
- `agrees`: what Prometheus has of workers, rescales and recoveries is what `orchestrator status` says.
- `alerts_tested`: alerts that were evaluated without an error, whose verdict (1 fires, 0 doesn't) was there, and that
  fire and keep still when they should by `promtool test rules`.
- `gone_s`: from the end of the run until Prometheus had no series of it.
- `export_s`: how long the controller takes, in its own thread, to set everything for 10 new steps.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import ROOT, Result, Spread, equals, run, say
from benchmarks.support.data import data_spec, stores_dir
from benchmarks.support.product import LiveRun, Product
from benchmarks.support.prometheus import Prometheus, missing_programs
from dashboards.alerts import ALERTS
from dashboards.queries import series
from orchestrator.cluster.local import state_dir
from orchestrator.policy.state.progress import Progress
from orchestrator.run_records.run_history import read_steps
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.telemetry.prometheus import Exporter
from orchestrator.telemetry.step_metrics import points_of_steps

FOLDER = ROOT / "dashboards"
NEVER = 1_000_000
MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
}
QUICK_MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
SCRAPE_EVERY_S = 5
VARIABLES = {"$run": ".+", "$__rate_interval": "1m", "$__range": "1h"}
PATIENCE_S = 90.0  # for the last samples: Ray reports every 10 s
LOOK_EVERY_S = 1.0
EXPORTS = 100


def measure(quick: bool) -> Result:
    if missing := missing_programs():
        raise SystemExit(f"this benchmark needs {' and '.join(missing)} (Debian's package is called prometheus)")
    with tempfile.TemporaryDirectory(prefix="dashboards-") as folder:
        workspace = Path(folder)
        storage = workspace / "runs"
        storage.mkdir()
        (storage / ".data").symlink_to(stores_dir(quick, workspace))
        with Product(workspace / "home", num_cpus=6) as product:
            targets = state_dir() / "scrape.json"
            with Prometheus(workspace / "prometheus", targets, FOLDER / "alerts.yml", SCRAPE_EVERY_S) as prometheus:
                live = LiveRun(product.client, job_of(data_spec(quick, workspace), storage, quick))
                live_through(live, product)
                found = ask_everything(prometheus) | {"agrees": comes_to_agree(prometheus, live)}
                version = prometheus.version()
                live.stop()
                found["gone_s"] = until_gone(prometheus)
                found["export_s"] = Spread.of(exports(live.run_dir))
    return Result(
        name="dashboards",
        seed=0,
        settings={"quick": quick, "scrape_every_s": SCRAPE_EVERY_S, "prometheus": version, "variables": VARIABLES},
        rounds=1,
        metrics=found,
        bars=(
            equals("panels_with_samples", found["panels"], found["panels_with_samples"]),
            equals("alerts_tested", found["alerts"], found["alerts_tested"]),
            equals("agrees", True, found["agrees"]),
        ),
    )


def live_through(live: LiveRun, product: Product) -> None:
    """What a run can go through, so that there is something to see of all of it."""
    live.until(lambda s: s.step > 30 and s.validation_loss is not None and s.checkpoint is not None, "it trains")
    say("it trains")
    live.scale(3)
    say("it has 3 workers")
    product.client.kill_worker(live.status().run_id)
    live.until(lambda s: bool(s.recoveries) and s.recoveries[-1].stall_s is not None, "it has recovered")
    whole = live.until(lambda s: s.workers_now == 3, "it has 3 workers again")
    live.until(lambda s: s.step > whole.step + 20, "it trains on")
    say("it has lost a worker and has another one")


def ask_everything(prometheus: Prometheus) -> dict[str, Any]:
    """Ask for every panel and alert until all have samples, or none comes any more."""
    panels, healthy = panels_of_files(), _tested_by_promtool()
    verdicts = {alert.name: [alert.verdict] for alert in ALERTS}
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        without = [name for name, queries in panels.items() if not _all_have_samples(prometheus, queries)]
        silent = [name for name, queries in verdicts.items() if not _all_have_samples(prometheus, queries)]
        tested = (healthy & prometheus.healthy_alerts()) - set(silent)
        if (not without and len(tested) == len(ALERTS)) or time.monotonic() > deadline_s:
            break
        time.sleep(LOOK_EVERY_S)
    say(f"{len(panels) - len(without)} of {len(panels)} panels have samples; without: {without or 'none'}")
    return {
        "dashboards": len(list(FOLDER.glob("*.json"))),
        "panels": len(panels),
        "panels_with_samples": len(panels) - len(without),
        "queries": sum(len(queries) for queries in panels.values()),
        "without_samples": without,
        "alerts": len(ALERTS),
        "alerts_tested": len(tested),
        "alerts_that_would_fire": [a.name for a in ALERTS if any(prometheus.values(a.verdict))],
        "series_of_the_run": len(prometheus.values('{__name__=~"ray_orchestrator_.+"}')),
    }


def comes_to_agree(prometheus: Prometheus, live: LiveRun) -> bool:
    """Whether Prometheus' figures become those of the run's status while nothing changes any more."""
    status = live.status()
    wanted = {
        "elastic/world_size": status.workers_now,
        "elastic/rescales": len(status.rescales),
        "elastic/recoveries": len(status.recoveries),
        "elastic/generation": status.generation,
    }
    deadline_s = time.monotonic() + PATIENCE_S
    while (seen := {name: prometheus.values(series(name)) for name in wanted}) != {n: [v] for n, v in wanted.items()}:
        if time.monotonic() > deadline_s:
            say(f"the status says {wanted}, Prometheus {seen}")
            return False
        time.sleep(LOOK_EVERY_S)
    return True


def panels_of_files() -> dict[str, list[str]]:
    """The queries of each panel, by dashboard and title, with Grafana's variables filled in."""
    found: dict[str, list[str]] = {}
    for path in sorted(FOLDER.glob("*.json")):
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            queries = [target["expr"] for target in panel["targets"]]
            found[f"{path.stem}: {panel['title']}"] = [_filled_in(query) for query in queries]
    return found


def _filled_in(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


def _all_have_samples(prometheus: Prometheus, queries: list[str]) -> bool:
    return all(prometheus.values(query) for query in queries)


def _tested_by_promtool() -> set[str]:
    """Names of the alerts with a case that fires and one that doesn't; none unless `promtool` finds all right."""
    done = subprocess.run(["promtool", "test", "rules", "alerts_test.yml"], cwd=FOLDER, capture_output=True, text=True)
    if done.returncode != 0:
        say(done.stdout + done.stderr)
        return set()
    file = yaml.safe_load((FOLDER / "alerts_test.yml").read_text(encoding="utf-8"))
    cases = [case for test in file["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in cases if case["exp_alerts"]}
    return fires & {case["alertname"] for case in cases if not case["exp_alerts"]}


def until_gone(prometheus: Prometheus) -> float:
    """How long Prometheus still has series of a run that has ended. Raises RuntimeError if they stay."""
    began_s = time.monotonic()
    while prometheus.values(series("run/committed_steps")):
        if time.monotonic() - began_s > PATIENCE_S:
            raise RuntimeError(f"the run has ended, and after {PATIENCE_S:.0f} s its series are still there")
        time.sleep(LOOK_EVERY_S)
    return time.monotonic() - began_s


def exports(run_dir: Path) -> list[float]:
    """Seconds to set all values of 10 steps, over and over, in this process, which is connected to Ray too."""
    exporter, points = Exporter("timed"), points_of_steps(Progress(), read_steps(run_dir)[:10])
    return [_timed(lambda: exporter.show(points)) for _ in range(EXPORTS)]


def _timed(work: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def job_of(data: DataSpec, storage: Path, quick: bool) -> JobSpec:
    """A job that never ends by itself."""
    return JobSpec.model_validate(
        {
            "name": "watched",
            "workers": {"min": 1, "max": 3, "initial": 2},
            "model": QUICK_MODEL if quick else MODEL,
            "train": {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 128, "max_steps": NEVER},
            "eval": {"every": 20},
            "checkpoint": {"every": 25, "keep_last": 2},
            "data": data,
            "storage": str(storage),
        }
    )


if __name__ == "__main__":
    run(__doc__, measure)
