"""A job's own model tried out at submission, in a process of its own."""

from pathlib import Path

import pytest

from orchestrator.errors import EntrypointError
from orchestrator.spec.job import JobSpec
from orchestrator.submission.submission import order_of
from orchestrator.submission.user_code import check_own_code, with_packages
from tests.support.wheels import write_wheel

pytestmark = pytest.mark.usefixtures("forked_torch")


def _job(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    (tmp_path / "code").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
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
    (digest,) = order.code
    assert order.spec.code == {str(tmp_path / "code"): digest}
    (tmp_path / "code" / "mine.py").write_text(source + "# changed")
    assert digest not in order_of(order.spec, None).code


def test_a_process_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(tmp_path, "import os; os._exit(7)", monkeypatch)
    with pytest.raises(EntrypointError, match="ended with code 7"):
        order_of(job, None)


def test_a_package_that_the_job_names_is_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_HOME", str(tmp_path / "home"))
    wheel = write_wheel(tmp_path, "tiny_for_dry_runs", "")
    job = _job(tmp_path / "code", "import tiny_for_dry_runs\nraise RuntimeError('it is there')", monkeypatch)
    with pytest.raises(EntrypointError, match="No module named 'tiny_for_dry_runs'") as caught:
        check_own_code(*with_packages(job))
    assert "may be named in the job's pip" in caught.value.remedy
    with pytest.raises(EntrypointError, match="it is there"):
        check_own_code(*with_packages(job.model_copy(update={"pip": [wheel]})))


def test_ours_needs_no_look() -> None:
    check_own_code(JobSpec(name="ours"), {})


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "torch.nn:Linear", "no_such:build"])
@pytest.mark.parametrize("key", ["entrypoint", "signal"])
def test_code_that_was_not_submitted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    section = {"model": {"entrypoint": name}}
    if key == "signal":
        section = {"curriculum": {"signal": name, "stages": [{"name": "all"}]}}  # type: ignore[dict-item]
    job = JobSpec.model_validate({"schema": "v1", "name": "own", **section})
    with pytest.raises(EntrypointError, match=f"{key} {name} can't be imported: ModuleNotFoundError: No module"):
        order_of(job, None)


def test_a_check_has_the_secrets_and_hides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("hunter22\n")
    secrets = {"API_KEY": f"file:{tmp_path}/key", "FAR": "env:NO_SUCH_KEY"}
    for source, code in (
        ("raise RuntimeError(f'no access with {key}')", 0),
        ("os.write(2, key.encode()), os._exit(7)", 7),
    ):
        job = _job(tmp_path / str(code), f"import os\nkey = os.environ['API_KEY']\n{source}\n", monkeypatch)
        with pytest.raises(EntrypointError) as caught:
            check_own_code(*with_packages(job.model_copy(update={"secrets": secrets})))
        told = f"{caught.value}\n{caught.value.traceback}"
        assert "hunter22" not in told and "***" in told
        assert ("secrets that are not on this machine were not set: FAR" in told) is (code == 0)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def make(options):\n    return 7", "callbacks.entrypoint mine:make returned a int"),
        ("def make(options):\n    return 1 / 0", "callbacks.entrypoint mine:make raised ZeroDivisionError"),
        ("def other(options): ...", "has no function make"),
    ],
)
def test_an_object_that_is_no_callback_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, why: str
) -> None:
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    job = JobSpec.model_validate({"schema": "v1", "name": "own", "callbacks": [{"entrypoint": "mine:make"}]})
    with pytest.raises(EntrypointError, match=why) as caught:
        order_of(job, None)
    assert caught.value.unchanged == "Nothing was started."


def test_a_callback_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("from orchestrator.callback import Callback\ndef make(o):\n    return Callback()")
    monkeypatch.chdir(tmp_path)
    job = JobSpec.model_validate({"schema": "v1", "name": "own", "callbacks": [{"entrypoint": "mine:make"}]})
    assert order_of(job, None).spec.callbacks[0].code_dir == str(tmp_path)
