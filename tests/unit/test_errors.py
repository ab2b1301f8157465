import pickle

import pytest

from orchestrator import errors
from orchestrator.cli.terminal.exit_codes import EXIT_CODES
from orchestrator.errors import DataError, OrchestratorError, Problem, SpecError


def classes() -> list[type[OrchestratorError]]:
    found = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, OrchestratorError)]
    return sorted(found, key=lambda c: c.__name__)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("UsageError", 2),
        ("SpecError", 2),
        ("DataError", 2),
        ("StoreCorrupt", 104),
        ("NameTaken", 2),
        ("StorageError", 104),
        ("ClusterUnreachable", 69),
        ("NotAllowed", 77),
        ("RunFailed", 100),
        ("JobDoesNotFit", 105),
        ("CheckpointCorrupt", 104),
        ("JournalCorrupt", 104),
        ("TermSuperseded", 70),
        ("ProtocolError", 70),
        ("NotFinished", 101),
        ("NotFound", 102),
        ("RunStopped", 103),
    ],
)
def test_exit_codes_are_those_of_the_design(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code


def test_every_class_is_documented_and_has_a_known_exit_code() -> None:
    for cls in classes():
        assert cls.__doc__, cls
        assert cls.exit_code in EXIT_CODES, cls


def test_message_reads_as_sentences_in_order() -> None:
    error = DataError("corpus x is empty", remedy="Add text.", unchanged="Nothing was written")
    assert str(error) == "corpus x is empty. Add text. Nothing was written."
    assert str(DataError("corpus x is empty")) == "corpus x is empty."


@pytest.mark.parametrize("cls", [c for c in classes() if c is not SpecError], ids=lambda c: c.__name__)
def test_errors_survive_a_process_border(cls: type[OrchestratorError]) -> None:
    error = cls("value: rule", remedy="Do this.", unchanged="All is as before.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert (copy.message, copy.remedy, copy.unchanged) == ("value: rule", "Do this.", "All is as before.")
    assert str(copy) == str(error)


def test_spec_error_lists_all_problems_and_survives_a_process_border() -> None:
    problems = (Problem("job.yaml", 3, 5, "train.lr", "must be > 0; got -1"), Problem("job.yaml", 9, 1, "", "bad file"))
    error = SpecError(problems)
    copy = pickle.loads(pickle.dumps(error))
    assert copy.problems == problems
    assert str(copy).splitlines() == [
        "job.yaml:3:5: train.lr: must be > 0; got -1",
        "job.yaml:9:1: bad file",
        "2 problems; `orchestrator job schema` lists every key. Nothing was started.",
    ]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (2, "UsageError"),
        (69, "ClusterUnreachable"),
        (77, "NotAllowed"),
        (104, "StorageError"),
        (1, "OrchestratorError"),
    ],
)
def test_each_error_has_an_exit_code(code: int, name: str) -> None:
    assert errors.of_code(code) is getattr(errors, name)
