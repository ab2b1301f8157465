from pathlib import Path

import pytest

from orchestrator.errors import NotFound
from orchestrator.policy.report.report import Rates
from orchestrator.run_records.prepared_data import DataPrepared, PreparedData
from orchestrator.spec.job import JobSpec
from orchestrator.submission.param_listing import state_of
from orchestrator.submission.report import read_report
from tests.unit.policy.stories import eventful, write

pytestmark = pytest.mark.usefixtures("forked_torch")

JOB = JobSpec.model_validate({"schema": "v1", "name": "try", "resources": {"gpus": 1}, "data": {"vocab_size": 512}})
TRAINED = 300  # tokens that the tokenizer has found


def test_the_model_is_as_large_as_the_trained_tokenizer_makes_it(tmp_path: Path) -> None:
    story = eventful()
    plain = read_report(write(story, tmp_path / "plain", JOB), Rates())
    story.tell(DataPrepared(PreparedData("/store", TRAINED, "/t")))
    told = read_report(write(story, tmp_path / "prepared", JOB), Rates())
    assert plain.flops is not None and told.flops is not None
    rows = plain.flops.active_parameters - told.flops.active_parameters
    assert rows == (512 - TRAINED) * JOB.model.hidden_size  # of the head; the embedding isn't multiplied with
    routed = sum(param.numel for param in state_of(JOB).params if param.expert is not None)
    dense = sum(param.numel for param in state_of(JOB).params if param.expert is None)
    active = dense - 512 * JOB.model.hidden_size + routed * JOB.model.num_experts_per_tok / JOB.model.n_routed_experts
    assert plain.flops.active_parameters == pytest.approx(active)
    assert told.workers.gpu == pytest.approx(told.workers.held)


def test_a_directory_without_a_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="holds no run"):
        read_report(tmp_path / "nothing", Rates())
