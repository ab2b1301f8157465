from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.engine.optim.lr_schedule import decay, learning_rate
from orchestrator.errors import EntrypointError
from orchestrator.spec.train import TrainSpec


def train(steps: int, lr: float = 1.0, **schedule: Any) -> TrainSpec:
    return TrainSpec.model_validate({"max_steps": steps, "lr": lr, "lr_scheduler": schedule})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "constant"}, [2, 2, 2, 2, 2]),
        ({"kind": "constant", "warmup_steps": 2}, [1, 2, 2, 2, 2]),
        ({"kind": "linear", "final_fraction": 0}, [2, 1.5, 1, 0.5, 0]),
        ({"kind": "linear", "final_fraction": 0.5, "warmup_steps": 1}, [2, 1.75, 1.5, 1.25, 1]),
        ({"kind": "cosine", "final_fraction": 0}, [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
        ({"kind": "cosine", "final_fraction": 0.5, "warmup_steps": 3}, [2 / 3, 4 / 3, 2, 1.5, 1]),
        ({"kind": "linear", "warmup_steps": 5}, [0.4, 0.8, 1.2, 1.6, 2]),
    ],
)
def test_curve(schedule: dict[str, Any], expected: list[float]) -> None:
    spec = train(steps=5, lr=2.0, **schedule)
    assert [learning_rate(spec, step) for step in range(5)] == pytest.approx(expected)


@given(
    kind=st.sampled_from(["linear", "cosine"]),
    steps=st.integers(3, 300),
    warmup_fraction=st.floats(0, 0.9),
    final_fraction=st.floats(0, 1),
)
def test_peak_and_last_step(kind: str, steps: int, warmup_fraction: float, final_fraction: float) -> None:
    warmup_steps = min(int(steps * warmup_fraction), steps - 1)
    spec = train(steps, lr=3e-3, kind=kind, warmup_steps=warmup_steps, final_fraction=final_fraction)
    rates = [learning_rate(spec, step) for step in range(steps)]
    peak_step = max(warmup_steps - 1, 0)
    assert rates[peak_step] == max(rates) == pytest.approx(3e-3)
    assert rates[: peak_step + 1] == sorted(rates[: peak_step + 1])
    assert rates[peak_step:] == sorted(rates[peak_step:], reverse=True)
    assert rates[-1] == pytest.approx(3e-3 * final_fraction)
    assert learning_rate(spec, steps + 10) == pytest.approx(rates[-1])


def test_run_of_one_step() -> None:
    assert learning_rate(train(1, kind="cosine"), 0) == 1.0


def test_the_decay_is_1_until_the_peak_and_falls_with_the_learning_rate() -> None:
    spec = train(steps=100, lr=0.02, warmup_steps=10, final_fraction=0.1)
    assert [decay(spec, step) for step in (0, 5, 9)] == [1.0, 1.0, 1.0]
    later = [decay(spec, step) for step in range(9, 100)]
    assert later == sorted(later, reverse=True) and later[-1] == pytest.approx(0.1)


def _own(folder: Path, body: str) -> TrainSpec:
    module = f"schedule_{abs(hash(body))}"
    (folder / f"{module}.py").write_text(f"def schedule(step, num_steps):\n    {body}\n")
    return TrainSpec(lr=2.0, max_steps=10, lr_scheduler={"entrypoint": f"{module}:schedule", "code_dir": str(folder)})  # type: ignore[arg-type]


def test_a_users_function_gives_the_factor(tmp_path: Path) -> None:
    own = _own(tmp_path, "return 3 * step / num_steps")
    assert [learning_rate(own, step) for step in (0, 5, 9)] == pytest.approx([0.0, 3.0, 5.4])
    assert [decay(own, step) for step in (0, 1, 9)] == [1.0, 1.0, 1.0]  # a warm-up to its end
    falling = _own(tmp_path, "import numpy; return numpy.float32(2.0 - step / num_steps)")
    assert [decay(falling, step) for step in (0, 5)] == pytest.approx([1.0, 0.75])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "returned None for step 3"),
        ("return True", "returned True for step 3"),
        ("return -1.0", "returned -1.0 for step 3"),
        ("return float('nan')", "returned nan for step 3"),
        ("return 1 / 0", "for step 3 raised ZeroDivisionError"),
    ],
)
def test_an_invalid_factor_is_named(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(EntrypointError, match=message):
        learning_rate(_own(tmp_path, body), 3)


def test_an_own_schedule_has_no_other_keys() -> None:
    with pytest.raises(ValidationError, match="warmup_steps is of a schedule of ours"):
        TrainSpec(lr_scheduler={"entrypoint": "mine:schedule", "warmup_steps": 5})  # type: ignore[arg-type]
