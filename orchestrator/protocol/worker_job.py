"""What a worker needs to become a standby of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerJob:
    """Constant information of a run for its workers, sent once."""

    run_id: str
    job_json: str  # the JobSpec, as JSON
    store_dir: str  # the packed token store
    storage_dir: str  # the run's directory in run storage
    head_host: str  # address of the cluster's head, where the rendezvous store runs
    threads: int  # torch threads
    orphan_s: float = 60.0  # a worker without contact to a controller for this long exits
    vocab_size: int = 0  # of the trained tokenizer
