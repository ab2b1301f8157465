"""The numerics fingerprint, of this processor and of what is another one to torch."""

import json
import os
import subprocess
import sys

import pytest
import torch

from orchestrator.engine.numerics import fingerprint
from orchestrator.policy.replay_check import differences

CPU = torch.device("cpu")


def test_the_same_machine_has_the_same_fingerprint() -> None:
    found = json.loads(fingerprint(CPU))
    assert found == json.loads(fingerprint(CPU))
    assert set(found) == {"orchestrator", "torch", "deepspeed", "mkl", "processor", "instructions", "threads"}
    assert json.loads(fingerprint(CPU, code={"/two": "b2", "/one": "a1"})) == found | {"code": "a1, b2"}


def test_a_compiler_and_its_settings_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    found = json.loads(fingerprint(CPU))
    assert json.loads(fingerprint(CPU, compiler="g++ 12")) == found | {"compiler": "g++ 12"}
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    assert json.loads(fingerprint(CPU)) == found
    assert json.loads(fingerprint(CPU, compiler="g++ 12")) == found | {"compiler": "g++ 12 TORCHINDUCTOR_FREEZING=1"}


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="it has no more than that")
def test_a_processor_with_fewer_instructions_has_other_numerics() -> None:
    program = (
        "import torch; from orchestrator.engine.numerics import fingerprint;"
        f"torch.set_num_threads({torch.get_num_threads()}); print(fingerprint(torch.device('cpu')))"
    )
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    said = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    here = json.loads(fingerprint(CPU))
    assert differences(here, json.loads(said.stdout)) == {"instructions": f"{here['instructions']} -> DEFAULT"}
