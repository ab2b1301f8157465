"""The package's face: what `from orchestrator import …` gives, and what it costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import orchestrator
from orchestrator.client import OrchestratorClient
from orchestrator.ray_train.trainer import ElasticTrainer


def test_what_is_named_is_there() -> None:
    assert orchestrator.OrchestratorClient is OrchestratorClient
    assert orchestrator.ElasticTrainer is ElasticTrainer
    assert set(orchestrator.__all__) <= set(dir(orchestrator)) and len(orchestrator.__all__) <= 10
    with pytest.raises(AttributeError, match="no attribute 'ElasticTrainers'"):
        orchestrator.__getattr__("ElasticTrainers")


def test_type_checkers_see_the_same_names() -> None:
    stub = ast.parse(Path(str(orchestrator.__file__)).with_suffix(".pyi").read_text())
    told = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == orchestrator._HOMES and sorted(told) == orchestrator.__all__


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import sys, orchestrator; print({'ray', 'torch', 'pandas', 'pydantic'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done
