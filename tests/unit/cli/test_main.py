"""The command: what it prints where, and its exit codes. No cluster."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from orchestrator.cli.main import main

ROOT = Path(__file__).parents[3]
VALID = "schema: v1\nname: try\n"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(VALID)
    return tmp_path


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def orchestrator(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forked_torch: None
) -> Callable[..., Done]:
    """The command in this process: Ray is imported once for all tests, and torch too."""
    monkeypatch.chdir(here)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(here / "home"))

    def run(*args: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["orchestrator", *args])
        with pytest.raises(SystemExit) as end:
            main()
        return Done(int(end.value.code or 0), *capsys.readouterr())

    return run


def python(here: Path, script: str, *args: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.mark.parametrize(
    "args", [["--version"], ["--help"], ["job", "validate", "job.yaml"], ["job", "schema"]], ids=" ".join
)
def test_what_needs_no_cluster_starts_without_ray(here: Path, args: list[str]) -> None:
    script = (
        "import sys; from orchestrator.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "slow = {'ray', 'torch', 'mlflow', 'pandas', 'matplotlib', 'deepspeed', 'textual', 'pynvml'}\n"
        "heavy = slow & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    done = python(here, script, *args)
    assert done.returncode == 0, done.stderr


def test_validate_prints_the_whole_job_as_json(here: Path, orchestrator: Callable[..., Done]) -> None:
    told = json.loads(orchestrator("job", "validate", "job.yaml", "-o", "json").stdout)
    assert told["schema"] == "v1" and told["model"]["num_experts_per_tok"] == 2 and told["train"]["lr"] > 0


def test_validate_and_plan_take_overrides(here: Path, orchestrator: Callable[..., Done]) -> None:
    job = json.loads(orchestrator("job", "validate", "job.yaml", "--set", "train.lr=0.5", "-o", "json").stdout)
    assert job["train"]["lr"] == 0.5
    plans = [
        json.loads(orchestrator("job", "plan", "job.yaml", "-o", "json", *sets).stdout)
        for sets in ((), ("--set", "model.n_routed_experts=4", "--set", "model.vocab_size=512"))
    ]
    assert plans[1]["num_parameters"] < plans[0]["num_parameters"]
    refused = orchestrator("job", "plan", "job.yaml", "--set", "train.lr=fast")
    assert refused.returncode == 2 and "--set train.lr=fast" in refused.stderr


def test_validate_and_plan_show_the_node_pool(here: Path, orchestrator: Callable[..., Done]) -> None:
    job = yaml.safe_load((here / "job.yaml").read_text())
    workers = {"min": 1, "max": 2, "label_selector": {"pool": "in(a, b)", "spot": "!yes"}}
    (here / "pools.yaml").write_text(yaml.safe_dump(job | {"workers": workers}))
    for verb in ("validate", "plan"):
        assert "on nodes with labels {pool: in(a,b), spot: !yes}" in " ".join(
            orchestrator("job", verb, "pools.yaml").stderr.split()
        )


def test_validate_lists_every_problem_with_its_position(here: Path, orchestrator: Callable[..., Done]) -> None:
    (here / "bad.yaml").write_text(f"{VALID}workrs: 2\ntrain: {{max_steps: 0}}\n")
    done = orchestrator("job", "validate", "bad.yaml")
    assert done.returncode == 2 and done.stdout == ""
    assert "bad.yaml:3:1: workrs" in done.stderr and "bad.yaml:4:9: train.max_steps" in done.stderr
    assert "Nothing was started." in done.stderr and "Traceback" not in done.stderr


def test_schema_is_json_on_stdout(orchestrator: Callable[..., Done]) -> None:
    done = orchestrator("job", "schema")
    assert json.loads(done.stdout)["required"] == ["schema", "name"] and done.stderr == ""


@pytest.mark.parametrize(
    "args",
    [["ls"], ["status", "try"], ["scale", "try", "--workers", "2"], ["stop", "try"], ["submit", "job.yaml"]],
    ids=lambda args: args[0],
)
def test_without_a_cluster_the_exit_code_is_69_and_the_remedy_is_printed(
    orchestrator: Callable[..., Done], args: list[str]
) -> None:
    done = orchestrator(*args)
    assert done.returncode == 69, done.stderr
    assert "orchestrator cluster up" in done.stderr and "Traceback" not in done.stderr


def test_a_dead_address_is_an_immediate_error(orchestrator: Callable[..., Done]) -> None:
    done = orchestrator("ls", "--address", "127.0.0.1:1")
    assert done.returncode == 69 and "127.0.0.1:1" in done.stderr


@pytest.mark.parametrize(
    ("job", "code", "cause"),
    [
        ("data: {source: ./nowhere}\n", 2, "does not exist"),
        ("tracking: {uri: 'sqlite:///x.db'}\n", 2, "tracking.uri"),
        ("storage: ./taken\n", 2, "exists already"),
        ("workers: {min: 3, max: 2}\n", 2, "min must be at most max"),
    ],
    ids=["corpus", "tracking", "name", "spec"],
)
def test_run_refuses_before_it_starts_anything(
    here: Path, orchestrator: Callable[..., Done], job: str, code: int, cause: str
) -> None:
    (here / "job.yaml").write_text(VALID + job)
    (here / "taken" / "try").mkdir(parents=True)
    (here / "taken" / "try" / "precious").touch()
    done = orchestrator("run", "job.yaml")
    assert done.returncode == code, done.stderr
    assert cause in done.stderr and "Started Ray" not in done.stderr
    assert not (here / "home").exists()


def test_records_of_a_missing_run(orchestrator: Callable[..., Done]) -> None:
    for verb in ("status", "check data", "events", "logs"):
        done = orchestrator(*verb.split(), "try", "--storage", ".")
        assert done.returncode == 102 and "holds no run" in done.stderr


@pytest.mark.parametrize("verb", ["status", "check data", "events", "logs", "checkpoint ls", "wait", "rm"])
def test_a_name_that_is_no_run_exits_102_with_the_nearest(
    here: Path, orchestrator: Callable[..., Done], verb: str
) -> None:
    for name in ("quickstart", "books"):
        (here / "runs" / name).mkdir(parents=True)
        (here / "runs" / name / "job.json").write_text("{}")
    done = orchestrator(*verb.split(), "quikstart")
    assert done.returncode == 102 and done.stdout == ""
    assert "Did you mean `quickstart`?" in done.stderr and "books" not in done.stderr
    named = orchestrator(*verb.split(), "boks", "--storage", "runs")
    assert named.returncode == 102 and "Did you mean `books`?" in named.stderr


def test_plan_prints_every_size_and_json(here: Path, orchestrator: Callable[..., Done]) -> None:
    (here / "job.yaml").write_text(VALID + "workers: 1..3\n")
    told = orchestrator("job", "plan", "job.yaml")
    assert told.returncode == 0 and "Estimates:" in told.stderr
    assert "MEMORY" in told.stdout and "3 -> 2" in told.stdout and "gradients reduced" in told.stdout
    (world,) = json.loads(orchestrator("job", "plan", "job.yaml", "-w", "2", "-o", "json").stdout)["worlds"]
    assert world["world_size"] == 2 and [r["to_size"] for r in world["rescales"]] == [1, 3]
    assert orchestrator("job", "plan", "job.yaml", "-w", "4").returncode == 2


@pytest.mark.parametrize("verb", [["job", "plan"], ["run", "--local"]], ids=["plan", "run"])
def test_workers_that_do_not_fit_their_memory_are_refused(
    here: Path, orchestrator: Callable[..., Done], verb: list[str]
) -> None:
    (here / "job.yaml").write_text(VALID + "workers: 2\nresources: {memory: 300MB}\n")
    told = orchestrator(*(verb if verb[0] == "job" else verb[:1]), "job.yaml", *(() if verb[0] == "job" else verb[1:]))
    assert told.returncode == 2 and ("MEMORY" in told.stdout) == (verb[0] == "job")
    assert "resources.memory is 300MB (300.0 MB), and a worker of" in told.stderr
    assert "its own snapshots and its protected rank's" in told.stderr and "protection.every: none" in told.stderr
    assert told.stderr.rstrip().endswith("Nothing was started.")
    assert not (here / "runs").exists()


def test_a_bug_keeps_its_traceback(here: Path) -> None:
    script = (
        "from orchestrator.cli import main\n"
        "def broken(): raise ZeroDivisionError('a bug')\n"
        "main.app = broken\n"
        "main.main()\n"
    )
    done = python(here, script)
    assert done.returncode == 70 and "ZeroDivisionError: a bug" in done.stderr


def test_colour_only_where_it_is_wanted(here: Path) -> None:
    script = "from orchestrator.cli.main import main; main()"
    assert "31m" in python(here, script, "job", "validate", "none.yaml", FORCE_COLOR="1").stderr
    assert "31m" not in python(here, script, "job", "validate", "none.yaml", FORCE_COLOR="1", NO_COLOR="1").stderr
    assert "\x1b" not in python(here, script, "job", "validate", "none.yaml").stderr


def test_a_traceback_of_the_users_model_comes_first(orchestrator: Callable[..., Done], here: Path) -> None:
    (here / "broken.py").write_text("import nowhere\n")
    (here / "job.yaml").write_text(VALID + 'model: {entrypoint: "broken:build"}\n')
    done = orchestrator("run", "job.yaml", "--local")
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "Nothing was started."
    why = "ModuleNotFoundError: No module named 'nowhere'"
    error = lines.index(f"error: model.entrypoint broken:build can't be imported: {why}")
    assert lines[error - 1] == why
