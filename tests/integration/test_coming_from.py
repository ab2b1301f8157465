"""The scripts of docs/coming-from.md, each run as its reader would."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.own_models import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.journey, pytest.mark.timeout(300)]

PATIENCE_S = 240.0
PAGE = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
SCRIPTS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
TRAINERS = sorted(name for name in SCRIPTS if name.startswith("with_"))


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What each script prints last. They run one after the other: the cores are few."""
    found = {}
    for script in TRAINERS:
        folder = tmp_path_factory.mktemp("script")
        for name in ("digits.py", script):
            (folder / name).write_text(SCRIPTS[name])
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "ORCHESTRATOR_"))}
        env |= {"PYTHONPATH": str(ROOT), "ORCHESTRATOR_HOME": str(folder / "home"), "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, script]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, f"{script}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        last = done.stdout.strip().splitlines()[-1]
        assert last.startswith("accuracy "), last
        found[script] = float(last.removeprefix("accuracy "))
    return found


def test_the_page_shows_four_trainers() -> None:
    assert TRAINERS == ["with_hf_trainer.py", "with_lightning.py", "with_orchestrator.py", "with_ray_train.py"]


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINERS)
def test_a_script_of_the_page_learns(script: str, accuracies: dict[str, float]) -> None:
    assert accuracies[script] >= 0.85
