"""Memory that a worker has before it needs it, in a process with a worker's malloc settings."""

import json
import os
import subprocess
import sys

import pytest

from orchestrator.controller.worker_env import WORKER_ENV

MB = 1 << 20
# What each step adds to the process's resident memory, in MB.
SCRIPT = """
import json, torch
from orchestrator.worker.step.memory_probe import taken_bytes
from orchestrator.worker.transition.reserved_memory import reserve

cpu, added = torch.device("cpu"), {}

def step(name, action):
    before = taken_bytes(cpu)
    result = action()
    added[name] = (taken_bytes(cpu) - before) / 2**20
    return result

sizes = [96 << 20, 32 << 20]

def use():
    return [torch.ones(size, dtype=torch.uint8) for size in sizes]

def cycles(count):
    for _ in range(count):
        reserve(sizes)
        use()

step("reserve", lambda: reserve(sizes))
step("again", lambda: reserve(sizes))
small = [torch.empty(1 << 10) for _ in range(200)]  # more than holes of the heap have room for
used = step("use", use)
del used
cycles(2)  # the heap finds its shape
step("cycles", lambda: cycles(5))
step("more", lambda: reserve([*sizes, 64 << 20]))
step("too much", lambda: reserve([1 << 50]))
print(json.dumps(added))
"""


@pytest.fixture(scope="module")
def added() -> dict[str, float]:
    environment = {**os.environ, **WORKER_ENV}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def test_reserved_memory_is_resident(added: dict[str, float]) -> None:
    assert added["reserve"] == pytest.approx(128, abs=16)


def test_use_of_reserved_memory_adds_none(added: dict[str, float]) -> None:
    assert added["use"] < 16


def test_what_is_free_is_not_asked_for_again(added: dict[str, float]) -> None:
    assert added["again"] < 16
    assert added["cycles"] < 16


def test_only_what_is_missing_is_asked_for(added: dict[str, float]) -> None:
    assert added["more"] < 64 + 16


def test_more_than_the_machine_has_left_is_not_asked_for(added: dict[str, float]) -> None:
    assert added["too much"] < 16
