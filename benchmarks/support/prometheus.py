"""A real Prometheus on loopback that scrapes a local cluster, as one beside a user's cluster would."""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError

import yaml

LOOK_EVERY_S = 0.2
START_S = 60.0
END_S = 20.0


def missing_programs() -> list[str]:
    return [name for name in ("prometheus", "promtool") if shutil.which(name) is None]


class Prometheus:
    """Started on entering, ended on leaving.

    Args:
        folder: for its files; made here.
        targets: a file as `file_sd_configs` reads it.
        rules: a rule file.
        every_s: between two scrapes, and two evaluations of rules; a whole number.
    """

    def __init__(self, folder: Path, targets: Path, rules: Path, every_s: int) -> None:
        folder.mkdir(parents=True)
        pace = {"scrape_interval": f"{every_s}s", "evaluation_interval": f"{every_s}s"}
        scrape = {"job_name": "ray", "file_sd_configs": [{"files": [str(targets)]}]}
        config = {"global": pace, "rule_files": [str(rules)], "scrape_configs": [scrape]}
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self._log = folder / "prometheus.log"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline_s = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.__exit__()
                raise RuntimeError(f"Prometheus did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(LOOK_EVERY_S)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def values(self, query: str) -> list[float]:
        """The samples that a query has now, those that are no number left out. Raises URLError for a wrong query."""
        found = self._get(f"query?{urllib.parse.urlencode({'query': query})}")["result"]
        values = (float(series["value"][1]) for series in found)
        return [value for value in values if not math.isnan(value)]

    def healthy_alerts(self) -> set[str]:
        """Names of the alerts whose rules were evaluated without an error."""
        groups = self._get("rules")["groups"]
        return {rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "ok"}

    def version(self) -> str:
        return str(self._get("status/buildinfo")["version"])

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def _get(self, what: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/api/v1/{what}", timeout=10.0) as answer:
            return json.load(answer)["data"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
