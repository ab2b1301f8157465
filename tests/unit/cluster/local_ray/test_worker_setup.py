"""What Ray begins a worker's process with on a local cluster."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.local_ray.worker_setup import is_plain

SCRIPT = Path(__file__).parents[4] / "orchestrator" / "cluster" / "local_ray" / "worker_setup.py"
WORKER = """
import os, sys
print(sys.argv[1:], os.environ.get("OF_RUN"), os.environ.get("OF_PREFIX"), "ray" in sys.modules)
"""


def _printed(tmp_path: Path, **context: Any) -> str:
    """What a worker prints of its arguments and variables."""
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = [str(tmp_path / "worker.py"), "--node=a b", "--port=1"]
    described = [f"--serialized-runtime-env-context={json.dumps(context)}", "--language=PYTHON"]
    command = [sys.executable, str(SCRIPT), *arguments, *described]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_variables_are_set_and_arguments_passed_on(tmp_path: Path) -> None:
    printed = _printed(tmp_path, env_vars={"OF_RUN": "x y"}, py_executable=sys.executable)
    assert printed == "['--node=a b', '--port=1'] x y None False"
    assert _printed(tmp_path) == "['--node=a b', '--port=1'] None None False"


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        ({"command_prefix": ["export OF_PREFIX=2 &&"]}, "None 2"),
        ({"env_vars": {"OF_RUN": "${OF_NOBODY}z"}}, "z None"),
        ({"override_worker_entrypoint": "WORKER"}, "None None"),
    ],
)
def test_what_needs_more_is_left_to_ray(tmp_path: Path, context: dict[str, Any], wanted: str) -> None:
    if "override_worker_entrypoint" in context:
        context = {"override_worker_entrypoint": str(tmp_path / "worker.py")}
    assert not is_plain(context, ["--language=PYTHON"])
    assert _printed(tmp_path, **context) == f"['--node=a b', '--port=1'] {wanted} False"


def test_other_languages_are_left_to_ray() -> None:
    assert is_plain({}, ["--language=PYTHON"]) and not is_plain({}, ["--language=JAVA"])
    assert not is_plain({"py_executable": "uv run python"}, ["--language=PYTHON"])
