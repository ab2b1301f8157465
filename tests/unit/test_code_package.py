"""Packages of a user's code: what is in them, and how a node gets them."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import count
from pathlib import Path

import pytest

from orchestrator import code_archive, code_package
from orchestrator.code_archive import packed, unpack
from orchestrator.code_package import UNUSED_S, of_user, package_name, placed
from orchestrator.errors import OrchestratorError, StorageError, UsageError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.keys.section import with_code_dirs
from orchestrator.storage.backends.bucket_url import BucketUrl
from orchestrator.storage.backends.location import Location, objects_at
from tests.support.request_proxy import RequestProxy

number = count()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A directory of code, with much else in it."""
    directory = tmp_path / "project"
    for name in ("mine.py", "inner/part.py", "inner/words.txt", "tool.sh"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"# {name}\n")
    for name in (".git/config", "__pycache__/mine.pyc", "env/pyvenv.cfg", "env/lib.py", "store/run/part", "runs/a"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("no code")
    (directory / "tool.sh").chmod(0o755)
    (directory / "again.py").symlink_to(directory / "mine.py")
    (directory / "data").symlink_to(tmp_path)
    os.mkfifo(directory / "pipe")
    return directory


def _job(code: Path, digest: str) -> JobSpec:
    callback = {"entrypoint": "mine:make", "code_dir": str(code)}
    scheduler = {"entrypoint": "mine:factor", "code_dir": str(code)}
    signal = {"signal": "mine:score", "code_dir": str(code), "stages": [{"name": "all"}]}
    sections = {"callbacks": [callback], "train": {"lr_scheduler": scheduler}, "curriculum": signal}
    sections |= {key: {"entrypoint": "mine:make", "code_dir": str(code)} for key in ("model", "task")}
    return JobSpec.model_validate({"schema": "v1", "name": "own", "code": {str(code): digest}, **sections})


def _stored(location: Location, code: Path) -> JobSpec:
    if isinstance(location, Path):
        location.mkdir(parents=True)
    package = packed(code, location)
    digest = sha256(package).hexdigest()
    objects_at(location).create(package_name(digest), package)
    return _job(code, digest)


def _directories(job: JobSpec) -> list[str]:
    found: list[str] = []
    with_code_dirs(job, lambda directory: found.append(directory) or directory)  # type: ignore[func-returns-value]
    return found


def test_a_package_has_the_code_and_depends_on_nothing_else(code: Path, tmp_path: Path) -> None:
    package = packed(code, code / "store")
    unpack(package, tmp_path / "there")
    found = {path.relative_to(tmp_path / "there").as_posix() for path in (tmp_path / "there").rglob("*")}
    assert found == {"mine.py", "inner", "inner/part.py", "inner/words.txt", "tool.sh", "again.py", "data"}
    assert os.readlink(tmp_path / "there" / "again.py") == "mine.py"
    assert (tmp_path / "there" / "data").resolve() == tmp_path
    assert os.access(tmp_path / "there" / "tool.sh", os.X_OK) and not os.access(tmp_path / "there" / "mine.py", os.X_OK)
    (code / "__pycache__" / "inner.pyc").touch()
    os.utime(code / "mine.py", (0, 0))
    assert packed(code, code / "store") == package
    (code / "inner" / "words.txt").write_text("other words")
    assert packed(code, code / "store") != package


def test_a_directory_that_is_too_large_is_refused(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code / "inner" / "weights.bin").write_bytes(bytes(3 << 20))
    packed(code, code / "store")
    monkeypatch.setattr(code_archive, "MOST_BYTES", 2 << 20)
    with pytest.raises(UsageError, match=r"holds more than 2 MiB, inner/weights.bin alone 3 MiB") as caught:
        packed(code, code / "store")
    assert "code_dir" in caught.value.remedy and caught.value.unchanged == "Nothing was started."


@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_a_node_gets_the_code_of_every_section_once(
    code: Path, tmp_path: Path, home: Path, bucket: tuple[str, RequestProxy], kind: str
) -> None:
    location: Location = tmp_path / "storage" / "run"
    if kind == "bucket":
        location = BucketUrl(bucket[0]) / f"code-{next(number)}" / "run"
    job = _stored(location, code)
    (code / "mine.py").write_text("# changed since\n")
    with ThreadPoolExecutor(4) as pool:
        jobs = list(pool.map(lambda _: placed(job, location), range(4)))
    (there,) = set(_directories(jobs[0]))
    assert [_directories(each) for each in jobs] == [[there] * 5] * 4
    assert (Path(there) / "mine.py").read_text() == "# mine.py\n"
    assert of_user(f"{there}/mine.py:3") == f"{next(iter(job.code))}/mine.py:3"
    assert [path.name for path in (home / "code").iterdir()] == [*job.code.values()]
    objects_at(location).delete([package_name(*job.code.values())])
    assert placed(job, location) == jobs[0] == placed(jobs[0], location)


def test_a_job_without_packages_stays_as_it_is(code: Path, tmp_path: Path) -> None:
    job = _job(code, "0" * 64).model_copy(update={"code": {}})
    assert placed(job, tmp_path) == job


def test_other_code_than_what_was_submitted_is_not_used(code: Path, tmp_path: Path, home: Path) -> None:
    job = _stored(tmp_path / "run", code)
    package = tmp_path / "run" / package_name(*job.code.values())
    good = package.read_bytes()
    package.write_bytes(good.replace(b"# mine.py", b"# evil.py"))
    with pytest.raises(UsageError, match="is not the code that was submitted"):
        placed(job, tmp_path / "run")
    package.unlink()
    with pytest.raises(StorageError, match="is missing: No such file"):
        placed(job, tmp_path / "run")
    package.write_bytes(good)
    home.touch()
    with pytest.raises(OrchestratorError, match="code can't be unpacked in") as caught:
        placed(job, tmp_path / "run")
    assert "ORCHESTRATOR_HOME" in caught.value.remedy
    home.unlink()
    assert placed(job, tmp_path / "run") != job


def test_code_that_no_process_uses_is_removed_after_a_while(code: Path, tmp_path: Path, home: Path) -> None:
    used, unused = _stored(tmp_path / "used", code), home / "code" / ("0" * 64)
    unused.mkdir(parents=True)
    use = (
        "import sys; from pathlib import Path; from orchestrator.code_package import unpacked\n"
        "print(unpacked(Path(sys.argv[1])), flush=True); sys.stdin.read()"
    )
    package = tmp_path / "used" / package_name(*used.code.values())
    command = [sys.executable, "-c", use, str(package)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        there = Path(process.stdout.readline().strip())
        old_s = time.time() - UNUSED_S - 60
        for directory in (there, unused):
            os.utime(directory, (old_s, old_s))
        (code / "mine.py").write_text("# next\n")
        placed(_stored(tmp_path / "next", code), tmp_path / "next")
        assert there.is_dir() and not unused.exists()
        process.communicate("")
    (code / "mine.py").write_text("# the one after\n")
    placed(_stored(tmp_path / "last", code), tmp_path / "last")
    assert not there.exists()


@pytest.mark.parametrize(
    "module",
    [
        *("worker.actor", "worker.replay.replay_rank", "inference.process", "run_records.data_preparation"),
        *("callback_process.callback_runner", "submission.report"),
    ],
)
def test_processes_of_a_run_that_import_a_users_code_have_what_was_submitted(module: str) -> None:
    text = (Path(code_package.__file__).parent / f"{module.replace('.', '/')}.py").read_text()
    assert re.search(r"\bplaced[(,] ?(job|spec|self\._job)[, ]", text)
