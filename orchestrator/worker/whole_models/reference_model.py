"""Process that computes the starting model's log-probabilities of pairs of answers, for preference optimization.

    python -m orchestrator.worker.whole_models.reference_model FD < order

It takes a `ReferenceOrder`: the new store has the same rows and the log-probabilities beside them, `reference_chosen`
and `reference_rejected`. A user's task that doesn't need them gets the store as it is.

The whole model is in this process, without a GPU: those are the workers'.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrator.data.manifest import SPLITS
from orchestrator.data.rows.row_store import RowStore
from orchestrator.data.rows.row_writer import new_rows, rows_key
from orchestrator.errors import OrchestratorError
from orchestrator.model.tasks.all_tasks import task_of
from orchestrator.model.tasks.preference import DirectPreference, log_probabilities
from orchestrator.protocol.child_process import REFERENCE_LINES, Fault, ReferenceProgress, ReferenceStore, answering
from orchestrator.requirements import use_requirements
from orchestrator.spec.job import JobSpec
from orchestrator.worker.whole_models.whole_model import starting_model


@torch.no_grad()
def write_reference(job: JobSpec, store: RowStore, to: Path, name: str, progress: Callable[[float], None]) -> str:
    """Write the store with log-probabilities as `to` / `name`, unless it is there. Returns the name.

    Args:
        name: empty for one by the content.
        progress: called with the share that is done.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, task = starting_model(job, store.manifest.num_outputs, device), DirectPreference(job.task.beta)
    at_once, rng = max(1, job.train.micro_batch_tokens // job.train.sequence_length), np.random.default_rng(0)
    done, total = 0, sum(store.num_rows(split) for split in SPLITS)
    with new_rows(to) as (writer, named):
        for split in SPLITS:
            writer.count_cut(split, store.manifest.splits[split].cut)
            for start in range(0, store.num_rows(split), at_once):
                rows_R = np.arange(start, min(start + at_once, store.num_rows(split)))
                rows = store.read(split, rows_R)
                arrays = task.collate(rows, rng)
                batch = {key: torch.from_numpy(array).to(device) for key, array in arrays.items()}
                chosen_R, rejected_R = log_probabilities(model, batch).double().cpu().numpy().reshape(2, -1)
                lengths_R = store.lengths(split, rows_R).tolist()
                for number, row in enumerate(rows):
                    reference = {"reference_chosen": chosen_R[number], "reference_rejected": rejected_R[number]}
                    writer.add(split, {**row, **reference}, f"row {start + number}", length=lengths_R[number])
                done += len(rows)
                progress(done / total)
        for other in store.further_files:
            writer.add_file(other, (store.directory / other).read_bytes())
        made_of: dict[str, Any] = {**store.manifest.made_of, "rows": store.digest}
        writer.finish(store.manifest.source, made_of, store.manifest.num_outputs)
        name = name or rows_key({"content": writer.digest})
        named.append(to / name)
    return name


def main() -> None:
    with answering(REFERENCE_LINES) as (order, answer):
        job = JobSpec.model_validate_json(order.job_json)
        try:
            use_requirements(job.pip)
            store, to, name = RowStore.open(Path(order.store_dir)), Path(order.to), order.name
            if not task_of(job.task, job.data_format).needs_reference:
                name = store.directory.name
            elif not name or not (to / name).is_dir():
                name = write_reference(job, store, to, name, lambda share: answer(ReferenceProgress(share)))
            answer(ReferenceStore(name))
        except OrchestratorError as error:
            answer(Fault.of(error))


if __name__ == "__main__":
    main()
