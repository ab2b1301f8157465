"""Packages that a job needs beside those of its environment, installed by the real pip."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.requirements import installed
from tests.support.wheels import write_wheel


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_package_is_there_for_processes_that_ask_for_it_and_for_no_other(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny_extra", "import numpy\nVALUE = numpy.arange(3).sum()", "numpy>=1")
    code = f"from orchestrator.requirements import use_requirements\nuse_requirements([{wheel!r}])\n"
    use = "import tiny_extra, numpy; print(tiny_extra.VALUE, numpy.__version__)"
    done = subprocess.run([sys.executable, "-c", code + use], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", version("numpy")]
    assert subprocess.run([sys.executable, "-c", use], capture_output=True).returncode == 1


def test_it_is_installed_once_whoever_asks_at_once(tmp_path: Path, home: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny_once", "")
    with ThreadPoolExecutor(3) as pool:
        places = set(pool.map(lambda _: installed([wheel]), range(3)))
    (place,) = places
    before = (place / "tiny_once.py").stat().st_mtime_ns
    assert installed([wheel]) == place and (place / "tiny_once.py").stat().st_mtime_ns == before
    assert len([path for path in (home / "pip").iterdir() if path.is_dir()]) == 1


def test_an_installation_that_was_cut_is_begun_again(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny_cut", "WHOLE = True")
    place = installed([wheel])
    (place.parents[2] / "done").unlink()  # as if the process had been killed before
    (place / "tiny_cut.py").write_text("")
    assert "WHOLE" in (installed([wheel]) / "tiny_cut.py").read_text()


def test_what_would_change_the_environment_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "tiny_old", "", "numpy<1.20")
    with pytest.raises(UsageError) as caught:
        installed([wheel])
    assert f"numpy=={version('numpy')}" in caught.value.message
    assert "environment has keep their versions" in caught.value.remedy


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such-file"):
        installed([f"tiny @ {(tmp_path / 'no-such-file-1.0-py3-none-any.whl').as_uri()}"])
