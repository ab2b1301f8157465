"""Ray Train interface to jobs: `ElasticTrainer(job, scaling_config=…, run_config=…).fit()`.

    from orchestrator import ElasticTrainer
    from ray.train import RunConfig, ScalingConfig

    trainer = ElasticTrainer(
        "jobs/quickstart.yaml",
        scaling_config=ScalingConfig(num_workers=(2, 8)),
        run_config=RunConfig(name="quickstart-1"),
    )
    result = trainer.fit()

Functions of the script can take the place of the job's task, model and data: `ElasticTrainer(task=…, model=…,
datasets=…)`.

The configs and the `Result` are Ray Train's own; the training loop is the job's. docs/ray-train.md lists the mapping.
Nothing is printed: events are logged by `logging`, under `orchestrator.ray_train`.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.train import BackendConfig, DataConfig
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2.api.result import Result

from orchestrator.client import OrchestratorClient, check_job, raise_unless_succeeded
from orchestrator.errors import NotFinished, NotFound, OrchestratorError, RunFailed, UsageError
from orchestrator.protocol.status import Recovery, Rescale, RunPhase, RunStatus
from orchestrator.ray_train.callbacks import CallbackError, Follower
from orchestrator.ray_train.cluster_client import client_of
from orchestrator.ray_train.mapping import settings_of
from orchestrator.ray_train.parts import Part, settings_of_parts
from orchestrator.ray_train.results import result_of
from orchestrator.run_records.job_files import read_job
from orchestrator.run_records.run_files import RunFiles, holds_run
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import job_from, load_job
from orchestrator.spec.job_file.yaml import dotted
from orchestrator.spec.keys.section import Path as Key
from orchestrator.spec.workers import AUTO
from orchestrator.storage.backends.location import location_of
from orchestrator.storage.backends.signing_keys import read_key
from orchestrator.submission.submission import resolved

log = logging.getLogger("orchestrator.ray_train")

STOP_S = 120.0  # how long a stopped run may take to write its checkpoint and end


class ElasticTrainer:
    """A job with Ray Train's configs, which override it.

    Args:
        job: a job file, the same as a dict, or a JobSpec; None for the defaults of all keys.
        task: a function of yours that makes the task (docs/tasks.md), or the name of a built-in one. Like the other
            parts it sets a key of the job, and is imported by other processes: it is defined at the top of a file.
        model: a function of yours that builds the model (docs/own-model.md).
        datasets: a function of yours that gives the rows of a split (docs/tasks.md), or a path, as `data.source`.
        scaling_config: number of workers, and resources of each; None for the job's.
        run_config: name, storage, failures, checkpoints, callbacks; None for the job's.
        address: HOST:PORT of the cluster's head; None for the one that this process is connected to, RAY_ADDRESS, or
            the local cluster. Without any, one is started on this machine for the run.
        take_over: resume the run even if it may be active in another cluster, which then ends its workers of it.

    Raises:
        UsageError: a config asks for something unsupported, or is none of Ray Train's; or a part can't be imported by
            other processes.
        SpecError: the job, with the configs applied, has mistakes.
    """

    def __init__(
        self,
        job: JobSpec | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        *,
        task: Part | str | None = None,
        model: Part | None = None,
        datasets: Part | str | os.PathLike[str] | None = None,
        scaling_config: ScalingConfig | None = None,
        run_config: RunConfig | None = None,
        address: str | None = None,
        take_over: bool = False,
    ) -> None:
        _check_type("scaling_config", scaling_config, ScalingConfig)
        _check_type("run_config", run_config, RunConfig)
        settings = (*settings_of_parts(task, model, datasets), *settings_of(scaling_config, run_config))
        if job is None:
            job = {"schema": "v1"}
        if isinstance(job, JobSpec):
            job = {"schema": job.version, **job.model_dump(mode="json", by_alias=True, exclude_unset=True)}
        self.job = job_from(job, "job", settings) if isinstance(job, Mapping) else load_job(job, settings)
        self.scaling_config = scaling_config or ScalingConfig(num_workers=(self.job.workers.min, self.job.workers.max))
        storage = location_of(self.job.storage)
        if not isinstance(storage, Path):
            raise UsageError(
                f"storage {storage} is a bucket; the checkpoints of a Result are directories",
                remedy="Name a directory that all nodes share, or submit the job with OrchestratorClient.",
                unchanged="Nothing was started.",
            )
        self.run_config = replace(run_config or RunConfig(), name=self.job.name, storage_path=self.job.storage)
        self._storage = storage
        self._address, self._take_over = address, take_over

    @property
    def run_dir(self) -> Path:
        """The run's directory in run storage."""
        return self._storage / self.job.name

    def fit(self) -> Result:
        """Run the job and wait for its end. A run of this name in the storage is followed if the cluster is running it,
        else resumed from its newest checkpoint. One that has succeeded is not repeated.

        Ctrl-C stops the run, which writes a checkpoint, and is raised once it has ended.

        Raises:
            ray.train.TrainingFailedError: the run did not succeed; our error is its cause. WorkerGroupError where a
                failure of workers ended it, else ControllerError.
            UsageError: the run of this name is one of another job.
            OrchestratorError: any other reason why it can't start, as in `OrchestratorClient`.
        """
        if self.run_config.logging_config not in (None, LoggingConfig()):
            log.setLevel(self.run_config.logging_config.log_level)
        if not holds_run(self.run_dir):
            check_job(self.job)  # before connecting to a cluster or starting one
        elif self._has_succeeded():
            log.info("run %s has succeeded already", self.job.name)
            return self._result()
        with client_of(self._address, self.job) as client:
            callbacks = [c for c in self.run_config.callbacks or () if isinstance(c, UserCallback)]
            follower = Follower(self.run_dir, callbacks, self._context())
            self._start(client)
            status = self._follow(client, follower)
        try:
            raise_unless_succeeded(status)
        except OrchestratorError as error:
            raise _training_failed(error, follower.failures) from error
        return self._result()

    def _has_succeeded(self) -> bool:
        """Whether the stored run has succeeded. Raises UsageError if it is a run of another job."""
        if different := _differences(read_job(self.run_dir), resolved(self.job)):
            raise UsageError(
                f"{self.run_dir} is a run of another job: {'; '.join(different)}",
                remedy="A run keeps the job that it began with: give this one another name, or that job.",
                unchanged="Nothing was started.",
            )
        key = None if self.job.signing_key is None else read_key(self.job.signing_key)
        return RunFiles(self.run_dir, key).status().phase is RunPhase.SUCCEEDED

    def _start(self, client: OrchestratorClient) -> None:
        name = self.job.name
        if not holds_run(self.run_dir):
            client.submit(self.job)
            log.info("run %s is submitted, its files are in %s", name, self.run_dir)
            return
        with suppress(NotFound):  # this cluster may not know it
            status = client.get(name)
            if not status.phase.ended and status.run_dir == str(self.run_dir):
                log.info("run %s is active: following it", name)
                return
        key, take_over = self.job.signing_key, self._take_over
        has_code = all(
            Path(directory).is_dir() for directory in RunFiles(self.run_dir, read_key(key) if key else None).job().code
        )
        client.resume(name, storage=self._storage, take_over=take_over, signing_key=key, new_code=has_code)
        log.info("run %s resumes", name)

    def _follow(self, client: OrchestratorClient, follower: Follower) -> RunStatus:
        name, logged = self.job.name, _Told()

        def look(status: RunStatus) -> None:
            logged.tell(status)
            if self.run_config.callbacks or status.phase.ended:
                follower.read_on()

        try:
            return client.wait(name, on_status=look)
        except (KeyboardInterrupt, CallbackError) as error:
            log.warning("run %s is stopped: %s", name, error or "interrupted")
            with suppress(UsageError, NotFinished):  # it has just ended, or takes long
                client.stop(name)
                client.wait(name, timeout_s=STOP_S)
            if isinstance(error, CallbackError):
                raise ControllerError(error.raised) from error.raised
            raise

    def _context(self) -> TrainRunContext:
        return TrainRunContext(
            run_config=self.run_config,
            train_loop_config=None,
            scaling_config=self.scaling_config,
            backend_config=BackendConfig(),
            dataset_config=DataConfig(),
        )

    def _result(self) -> Result:
        return result_of(self.run_dir, self.run_config.checkpoint_config)


class _Told:
    """Logs changes of a run's status, each once."""

    def __init__(self) -> None:
        self._phase: RunPhase | None = None
        self._told = -1  # generation

    def tell(self, status: RunStatus) -> None:
        if status.phase is not self._phase:
            log.info(
                "run %s is %s at step %d of %d: %s", status.run_id, status.phase, status.step, status.steps, status.why
            )
        both: tuple[Rescale | Recovery, ...] = (*status.rescales, *status.recoveries)
        changes = sorted(both, key=lambda change: change.generation)
        for change in (change for change in changes if change.generation > self._told):
            log.info(
                "run %s: %d -> %d workers after step %d: %s",
                status.run_id,
                change.from_size,
                change.to_size,
                change.step,
                change.why,
            )
        self._phase, self._told = status.phase, max((change.generation for change in changes), default=-1)


def _check_type(name: str, config: Any, wanted: type) -> None:
    if config is not None and not isinstance(config, wanted):
        raise UsageError(
            f"{name} must be a ray.train.{wanted.__name__}; got {type(config).__module__}.{type(config).__qualname__}",
            remedy="Import it from ray.train, where RAY_TRAIN_V2_ENABLED isn't 0.",
            unchanged="Nothing was started.",
        )


def _training_failed(error: OrchestratorError, failures: Mapping[int, Exception]) -> TrainingFailedError:
    if not isinstance(error, RunFailed) or not failures:
        return ControllerError(error)
    return WorkerGroupError(f"{error}\n{error.traceback}".strip(), dict(failures))


def _differences(stored: JobSpec, wanted: JobSpec) -> list[str]:
    """The keys in which two jobs differ, with both values."""
    tracking = {key: getattr(stored.tracking, key) for key in ("uri", "experiment", "tags")}  # may be of a submission
    changes = {"tracking": wanted.tracking.model_copy(update=tracking), "code": stored.code}
    wanted = wanted.model_copy(update=changes)
    if wanted.resources.gpus == AUTO:  # which the run's submission has replaced by a number
        resources = wanted.resources.model_copy(update={"gpus": stored.resources.gpus})
        wanted = wanted.model_copy(update={"resources": resources})
    old, new = (json.loads(job.model_dump_json(by_alias=True)) for job in (stored, wanted))
    return [f"{dotted(key)} was {before!r}, not {after!r}" for key, before, after in _unequal(old, new, ())]


def _unequal(old: Any, new: Any, key: Key) -> Iterator[tuple[Key, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for part in dict.fromkeys((*old, *new)):
            yield from _unequal(old.get(part), new.get(part), (*key, part))
    elif old != new:
        yield key, old, new
