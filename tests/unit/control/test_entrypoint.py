"""A job's own model tried out at submission, in a process of its own."""

from pathlib import Path

import pytest

from orchestrator.control.entrypoint import check_own_code
from orchestrator.control.orders import order_of
from orchestrator.errors import EntrypointError
from orchestrator.spec.job import JobSpec


def _job(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(source)
    model = {"entrypoint": "mine:build", "code_dir": "code"}
    return JobSpec.model_validate({"schema": "v1", "name": "own", "model": model, "envs": {"WIDTH": "8"}})


def test_a_mistake_comes_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EntrypointError, match="ModuleNotFoundError: No module named 'nowhere'") as caught:
        order_of(_job(tmp_path, "import nowhere", monkeypatch), None)
    assert caught.value.exit_code == 2 and caught.value.unchanged == "Nothing was started."
    assert f'File "{tmp_path}/code/mine.py", line 1' in caught.value.traceback


def test_a_model_that_can_be_trained_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import os\nfrom torch import nn\n"
        "def build(spec, vocab_size, experts):\n"
        "    width = int(os.environ['WIDTH'])\n"
        "    return nn.Sequential(nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size))\n"
    )
    order = order_of(_job(tmp_path, source, monkeypatch), None)
    assert order.spec.model.code_dir == str(tmp_path / "code")


def test_a_process_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(tmp_path, "import os; os._exit(7)", monkeypatch)
    with pytest.raises(EntrypointError, match="ended with code 7"):
        order_of(job, None)


def test_ours_needs_no_look() -> None:
    check_own_code(JobSpec(name="ours"))
