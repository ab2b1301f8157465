from pathlib import Path

from orchestrator.checkpoint.manifest import incomplete_name
from orchestrator.run_records.checkpoints import discard_unfinished


def test_parts_that_can_not_be_completed_are_deleted(tmp_path: Path) -> None:
    names = [incomplete_name(step, term, generation) for step, term, generation in ((9, 1, 0), (19, 1, 1), (29, 2, 1))]
    for name in (*names, "step-00000005"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    discard_unfinished(tmp_path, {(1, 1)})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {names[1], "step-00000005"}
