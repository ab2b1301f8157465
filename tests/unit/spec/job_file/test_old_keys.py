"""Former names of keys and values are refused with the present ones."""

import pytest

from orchestrator.errors import SpecError
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import parse_job
from orchestrator.spec.job_file.old_keys import OLD_KEYS, OLD_VALUES


@pytest.mark.parametrize(("old", "new"), OLD_KEYS.items(), ids=list(OLD_KEYS))
def test_an_old_key_is_refused_at_its_line_with_the_new_one(old: str, new: str) -> None:
    section, key = old.split(".")
    with pytest.raises(SpecError) as caught:
        parse_job(f"schema: v1\nname: try\n{section}:\n  {key}: 1\n")
    (problem,) = caught.value.problems
    assert (problem.line, problem.path) == (4, old)
    assert problem.message == f"unknown key; it is called {new} now"


def test_an_old_key_from_the_command_line_is_refused_too() -> None:
    with pytest.raises(SpecError, match=r"--set train.steps=9:1:1: train.steps: .* train.max_steps now"):
        parse_job("schema: v1\nname: try\n", overrides=["train.steps=9"])


@pytest.mark.parametrize("new", OLD_KEYS.values())
def test_a_new_key_exists(new: str) -> None:
    section, key = new.split(".")
    assert key in type(getattr(JobSpec(name="try"), section)).model_fields
    assert new not in OLD_KEYS


@pytest.mark.parametrize(("old", "new"), OLD_VALUES.items(), ids=list(OLD_VALUES))
def test_an_old_value_is_refused_with_the_new_one(old: str, new: str) -> None:
    path, value = old.split(": ")
    section, key = path.split(".")
    with pytest.raises(SpecError) as caught:
        parse_job(f"schema: v1\nname: try\n{section}:\n  {key}: {value}\n")
    (problem,) = caught.value.problems
    assert (problem.line, problem.path, problem.message) == (4, path, f"{value} is called {new} now")
    assert getattr(getattr(parse_job(f"schema: v1\nname: try\n{section}: {{{key}: {new}}}\n"), section), key) == new
