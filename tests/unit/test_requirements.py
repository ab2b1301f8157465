"""Packages that a job needs beside those of its environment, installed by the real pip."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

import orchestrator.requirements
from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.requirements import installed
from tests.support.wheels import write_wheel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_package_is_importable_only_in_processes_that_request_it(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny_extra", "import numpy\nVALUE = numpy.arange(3).sum()", "numpy>=1")
    code = f"import orchestrator.requirements as r\nr.use_requirements([{wheel!r}])\nprint(*r.used_versions())\n"
    use = "import tiny_extra, numpy; print(tiny_extra.VALUE, numpy.__version__)"
    done = subprocess.run([sys.executable, "-c", code + use], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tiny_extra==1.0", "3", version("numpy")]
    assert subprocess.run([sys.executable, "-c", use], capture_output=True).returncode == 1


def test_concurrent_requests_install_it_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheel = write_wheel(tmp_path, "tiny_once", "")
    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(lambda _: installed([wheel]), range(3)))) == 1
    installed([wheel])
    assert capfd.readouterr().err.count("pip installs tiny_once") == 1


def test_a_rebuilt_wheel_counts_as_another(tmp_path: Path) -> None:
    first = installed([write_wheel(tmp_path, "tiny_again", "VALUE = 1")])
    second = installed([write_wheel(tmp_path, "tiny_again", "VALUE = 2")])
    assert "1" in (first / "tiny_again.py").read_text() and "2" in (second / "tiny_again.py").read_text()


def test_an_installer_that_is_killed_leaves_nothing_that_others_take_for_whole(tmp_path: Path, home: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny_cut", "WHOLE = True")
    code = "import os, orchestrator.requirements as r\nr._run_pip = lambda *_: os.kill(os.getpid(), 9)\n"
    killed = subprocess.run([sys.executable, "-c", f"{code}r.installed([{wheel!r}])"], capture_output=True)
    assert killed.returncode == -9
    assert not [path for path in (home / "pip").iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert "WHOLE" in (installed([wheel]) / "tiny_cut.py").read_text()


def test_what_would_change_the_environment_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny_old", "", "numpy<1.20")
    with pytest.raises(UsageError) as caught:
        installed([wheel])
    assert f"(constraint) numpy=={version('numpy')}" in caught.value.message


def test_a_node_that_cannot_install_is_not_the_jobs_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OrchestratorError, match="No such file or directory") as failed:
        installed([f"tiny @ {(tmp_path / 'tiny-1.0-py3-none-any.whl').as_uri()}"])
    assert not isinstance(failed.value, UsageError)
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "file"))
    with pytest.raises(OrchestratorError, match="Not a directory") as failed:
        installed([write_wheel(tmp_path, "tiny_nowhere", "")])
    assert "ORCHESTRATOR_HOME" in failed.value.remedy


@pytest.mark.parametrize(
    "module",
    [
        *("worker.actor", "worker.replay.replay_rank", "worker.check_user_code", "worker.whole_models.reference_model"),
        *("inference.process", "model.param_listing", "run_records.data_preparation"),
        "callback_process.callback_runner",
    ],
)
def test_processes_that_import_a_users_code_have_its_packages(module: str) -> None:
    text = (Path(orchestrator.requirements.__file__).parent / f"{module.replace('.', '/')}.py").read_text()
    assert re.search(r"\buse_requirements\((job|spec|self\._job)\.pip\)", text)
