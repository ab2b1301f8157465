"""`train.determinism: exact` with real workers in real processes: the same bits whatever the world was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.checkpoint.manifest import manifest_of
from orchestrator.checkpoint.read import CheckpointReader
from orchestrator.checkpoint.write import commit
from orchestrator.model.building import catalogue
from orchestrator.spec.job import JobSpec
from tests.support.crew import Crew
from tests.support.texts import STEPS, VOCAB, small_job

WORLDS: list[list[int]] = [[1], [2], [3], [4], [2, 4, 3, 1, 2]]
Run = tuple[list[tuple[Any, ...]], dict[str, bytes]]


def _told(crew: Crew) -> list[tuple[Any, ...]]:
    assert sorted(crew.records) == list(range(STEPS))
    records = [record for _, record in sorted(crew.records.items())]
    return [(r.loss, r.grad_norm, r.validation_loss, r.max_violation, r.applied) for r in records]


def _state(crew: Crew, job: JobSpec) -> dict[str, bytes]:
    """Every tensor of the checkpoint after the last step."""
    members = crew.directive.current.world.members if crew.directive.current else ()
    shards = [crew.final[w].shards[-1] for w in members]
    params, buffers, shapes = catalogue(job.model, VOCAB)
    wanted = {f"{kind}/{p.name}": shapes[p.name] for p in params for kind in ("master", "exp_avg", "exp_avg_sq")}
    wanted |= {f"buffer/{name}": shapes[name] for name, _ in buffers}
    directory = Path(crew.job.storage_dir) / "checkpoints"
    path = commit(directory, manifest_of(shards, run_id="test", epoch=1, shapes=wanted), epoch=1)
    with CheckpointReader(path) as reader:
        return {name: reader.read(name, 0, t.numel).tobytes() for name, t in reader.manifest.tensors.items()}


def _run(job: JobSpec, store_dir: Path, directory: Path, worlds: list[int]) -> Run:
    with Crew(job, store_dir, directory, size=max(worlds)) as crew:
        crew.start(crew.plan(crew.ids[: worlds[0]]))
        for size in worlds[1:]:
            crew.await_step(crew.newest_step + 3)
            crew.rescale(crew.ids[-size:])
        crew.await_finished()
        return _told(crew), _state(crew, job)


def _differences(one: Run, other: Run) -> tuple[list[int], list[str]]:
    steps = [step for step, (a, b) in enumerate(zip(one[0], other[0], strict=True)) if a != b]
    assert one[1].keys() == other[1].keys()
    return steps, [name for name in one[1] if one[1][name] != other[1][name]]


@pytest.mark.parametrize(
    ("model", "train"),
    [
        ({}, {"precision": "fp32", "zero_stage": 1}),
        ({"top_k": 3, "num_shared_experts": 1}, {"precision": "fp32", "zero_stage": 2}),
        ({}, {"precision": "bf16", "zero_stage": 1}),
        ({"expert_intermediate_size": 36, "hidden_size": 40}, {"precision": "bf16", "zero_stage": 2}),
        ({"hidden_size": 36, "num_heads": 2, "num_kv_heads": 1, "expert_intermediate_size": 33}, {}),  # no alignment
        ({"expert_intermediate_size": 33, "router": "softmax", "top_k": 4}, {"gradient_clipping": 0.1}),
    ],
)
def test_all_worlds_end_with_the_same_bits(
    texts: Path, store_dir: Path, tmp_path: Path, model: dict[str, Any], train: dict[str, Any]
) -> None:
    job = small_job(texts, model, determinism="exact", **train)
    runs = [_run(job, store_dir, tmp_path / str(number), worlds) for number, worlds in enumerate(WORLDS)]
    for worlds, run in zip(WORLDS[1:], runs[1:], strict=True):
        assert _differences(runs[0], run) == ([], []), worlds
    assert runs[0][0][-1][0] < runs[0][0][0][0] - 0.3 and np.isfinite(runs[0][0][-1][1])


def test_without_it_worlds_differ(texts: Path, store_dir: Path, tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    job = small_job(texts)
    runs = [_run(job, store_dir, tmp_path / str(number), [size]) for number, size in enumerate((1, 3))]
    steps, names = _differences(*runs)
    assert steps and names
