"""`data prepare` on a real Ray: the same bytes as without one, whatever is killed in between."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from orchestrator.data.manifest import TOKENIZER
from orchestrator.data.prepare.job_store import prepare
from orchestrator.data.prepare.pipeline import prepare_corpora
from orchestrator.data.prepare.ray_map import on_cluster
from orchestrator.data.prepare.request import Request
from orchestrator.data.store import TokenStore
from orchestrator.errors import DataError, OrchestratorError
from orchestrator.run_records.data_preparation import Preparation
from orchestrator.spec.job import JobSpec
from orchestrator.submission.submission import order_of

ROOT = Path(__file__).parents[2]
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 9 MB: blocks enough for two to work on, and one of them to be killed midway."""
    folder = tmp_path_factory.mktemp("corpus")
    library = Path(os.__file__).parent
    texts = [path.read_text() for path in sorted(library.glob("*.py")) if path.stat().st_size]
    for number in range(3):
        rows = [{"text": f"# {number}\n{text}"} for text in texts]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def contents(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.directory.iterdir()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.journey
@pytest.mark.parametrize("difficulty", ["diversity", "reference_loss"])
def test_the_store_is_that_of_one_process(corpus: Path, tmp_path: Path, difficulty: str) -> None:
    request = Request((str(corpus),), vocab_size=300, deduplicate=False, difficulty=difficulty)
    done = prepare_corpora(request, tmp_path / "cluster", on_cluster)
    alone = prepare(str(corpus), 300, 0.05, tmp_path / "alone", difficulty=difficulty)
    assert done.num_blocks > 4
    assert contents(done.store) == contents(alone)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_a_node_keeps_its_words(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}\n')
    request = Request((str(tmp_path / "a.jsonl"),), vocab_size=300)

    def on_progress(stage: str, fraction: float) -> None:
        if (stage, fraction) == ("encoding", 0.0):
            (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "TWO"}\n')

    with pytest.raises(DataError, match="the corpus changed while it was read: .*a.jsonl") as raised:
        prepare_corpora(request, tmp_path / "stores", on_cluster, on_progress)
    assert raised.value.remedy and raised.value.unchanged == "No store was written."


def _die(task: str) -> str:
    raise ValueError(f"not this one: {task}")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_failing_cluster_is_a_readable_error() -> None:
    with pytest.raises(OrchestratorError, match="the tasks on the cluster failed: .*not this one: b") as raised:
        list(on_cluster(_die, ["b"]))
    assert "what is done is kept" in raised.value.unchanged
    assert list(on_cluster(str.upper, ["b"])) == ["B"]


def test_a_job_names_the_store(corpus: Path, tmp_path: Path) -> None:
    """From the job file to what its controller is handed: the store itself, and the tokenizer beside the run."""
    done = prepare_corpora(Request((str(corpus),), vocab_size=300), tmp_path / "stores", map)
    job = JobSpec.model_validate(
        {"schema": "v1", "name": "try", "storage": str(tmp_path), "data": {"source": str(done.store.directory)}}
    )
    order = order_of(job, None)
    (tmp_path / "run").mkdir()
    data = Preparation().prepare(order.job_json, str(tmp_path / "run"), str(tmp_path / "data"))
    assert data.store_dir == str(done.store.directory) and data.vocab_size == 300
    assert Path(data.tokenizer).read_bytes() == (done.store.directory / TOKENIZER).read_bytes()
    assert not (tmp_path / "data").exists()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[list[str]]:
    """The command, with a home of its own; whatever cluster it leaves up is ended afterwards."""
    yield [sys.executable, "-m", "orchestrator.cli.main"]
    subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.main", "cluster", "down", "--force"],
        env=environment(tmp_path),
        check=True,
        capture_output=True,
    )


def environment(home: Path) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**clean, "ORCHESTRATOR_HOME": str(home / "home"), "PYTHONPATH": str(ROOT)}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_interrupted_preparation_continues_and_gives_the_same_store(
    command: list[str], corpus: Path, tmp_path: Path
) -> None:
    """First by Ctrl-C, then, some blocks later, by SIGKILL of the command and all of its Ray."""
    out, env = tmp_path / "stores", environment(tmp_path)
    args = [*command, "data", "prepare", str(corpus), "--out", str(out), "--vocab-size", "300", "-o", "json"]
    first = started(args, env)
    await_parts(first, out, 2)
    first.send_signal(signal.SIGINT)
    _, narration = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 130, narration
    assert "the same command continues" in narration and "Stopped the Ray that was started." in narration

    second = started(args, env)
    await_parts(second, out, len(parts_in(out)) + 1)
    for process in [*psutil.Process(second.pid).children(recursive=True), psutil.Process(second.pid)]:
        process.send_signal(signal.SIGKILL)
    second.communicate(timeout=PATIENCE_S)
    assert not [path for path in out.glob("store-*") if path.is_dir()]
    left = parts_in(out)

    third = started(args, env)
    kept: dict[Path, int] = {}
    while third.poll() is None:  # parts are there until the store is
        found = parts_in(out)
        kept = found if len(found) >= len(kept) else kept
        time.sleep(0.01)
    told, narration = third.communicate()
    assert third.returncode == 0, narration
    assert all(kept.get(path) == written for path, written in left.items())

    store = TokenStore.open(json.loads(told)["store"], verify=True)
    alone = prepare_corpora(Request((str(corpus),), vocab_size=300), tmp_path / "alone", map).store
    assert contents(store) == contents(alone)
    assert not list(out.glob(".*"))


def started(args: list[str], env: dict[str, str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts_in(out: Path) -> dict[Path, int]:
    """Parts that are whole, and when each was written."""
    found = {}
    for path in out.glob(".*/*.part"):
        with suppress(FileNotFoundError):
            found[path] = path.stat().st_mtime_ns
    return found


def await_parts(process: "subprocess.Popen[str]", out: Path, count: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while len(parts_in(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()
        time.sleep(0.02)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_prints_what_it_read_dropped_and_wrote(command: list[str], tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"text number {number} " * 5}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, rows[0], '{"text": ""}', "no JSON"]) + "\n")
    args = [*command, "data", "prepare", "a.jsonl", "--out", "stores", "--vocab-size", "300"]
    env = environment(tmp_path)
    refused = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "1 of 203 records are bad, more than --max-bad 0.001 allows" in refused.stderr
    assert f"{tmp_path / 'a.jsonl'}:203: not JSON" in refused.stderr
    done = subprocess.run([*args, "--max-bad", "0.01"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for stage in ("Started Ray", "reading", "encoding", "writing", "Stopped the Ray that was started."):
        assert stage in done.stderr
    lines = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert lines["read"] == "203 records, 1 of them without text"
    assert "200 documents" in lines["kept"] and lines["kept"].endswith("left out: 1 duplicates, 1 bad")
    assert json.loads(Path(lines["quarantine"]).read_text())["line"] == 203
    counts = TokenStore.open(lines["store"]).manifest.splits
    assert lines["train"].startswith(f"{counts['train'].num_documents} documents")
