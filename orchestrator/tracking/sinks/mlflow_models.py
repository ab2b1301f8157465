"""Checkpoints as MLflow's LoggedModels of type `checkpoint`. Shards stay in run storage; MLflow has their path, step
and metrics, and of the one that is registered the model as other libraries load it:

    mlflow.search_logged_models(filter_string="metrics.`eval/loss` < 3 AND tags.`orchestrator.checkpoint` = 'stored'")
"""

import logging
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric, Run
from mlflow.exceptions import MlflowException

from orchestrator.errors import UsageError
from orchestrator.tracking.sinks.sink import Checkpoint, CheckpointMark, Fate, ModelExport

FATE_TAG = "orchestrator.checkpoint"  # a `Fate`
STEP_TAG = "orchestrator.step"
PATH_TAG = "orchestrator.path"
SEQ_TAG = "orchestrator.seq"  # of the checkpoint's event; unique, unlike its step
EXTERNAL_TAG = "mlflow.model.isExternal"  # MLflow's tag for artifacts that are stored elsewhere
MODEL_TYPE = "checkpoint"
_TAKEN = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")
_PAGE = 100
_PARTIAL = ".export-"  # begins the names of folders with models that MLflow doesn't have yet

logger = logging.getLogger(__name__)


class RunModels:
    """The models of one run. Every method is idempotent."""

    def __init__(self, client: MlflowClient, run: Run, run_id: str) -> None:
        self._client, self._run_id = client, run_id
        self._tracked_id, self._experiment_id = run.info.run_id, run.info.experiment_id

    def log(self, checkpoint: Checkpoint) -> None:
        try:
            model = self._find_or_create(checkpoint)
        except MlflowException as error:
            if error.error_code != "ENDPOINT_NOT_FOUND":
                raise
            logger.warning("the MLflow server is too old to keep checkpoints as models: %s", error)
            return
        outputs = [LoggedModelOutput(model.model_id, checkpoint.step)]
        self._client.log_outputs(self._tracked_id, outputs)
        metrics = [
            Metric(p.key, p.value, int(p.time * 1000), p.step, model_id=model.model_id, run_id=self._tracked_id)
            for p in checkpoint.points
        ]
        if metrics:
            self._client.log_batch(self._tracked_id, metrics=metrics)  # repeats of values that the run has already
        self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def mark(self, mark: CheckpointMark) -> None:
        for model in self._all():
            step = int(model.tags[STEP_TAG])
            is_meant = step in mark.steps or (mark.after is not None and step > mark.after)
            if is_meant and model.tags[FATE_TAG] == Fate.STORED:
                self._client.set_logged_model_tags(model.model_id, {FATE_TAG: mark.fate.value})

    def register(self, name: str, alias: str | None, export: ModelExport | None, directory: Path) -> None:
        """Register the newest checkpoint's model as a new version of `name`.

        Args:
            export: None: the version has no files, only the path of the checkpoint.
            directory: for the files until MLflow has them.
        """
        stored = [model for model in self._all() if model.tags[FATE_TAG] == Fate.STORED]
        if not stored:
            logger.warning("run %s has no checkpoint to register as %s", self._run_id, name)
            return
        newest = max(stored, key=lambda model: int(model.tags[STEP_TAG]))
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code not in _TAKEN:
                raise
        version = self._known_version(name, newest)
        if version is None:
            if export is not None:
                self._upload(newest, export, directory)
            version = self._new_version(name, newest)
        if alias is not None:
            self._client.set_registered_model_alias(name, alias, version)

    def _upload(self, model: LoggedModel, export: ModelExport, directory: Path) -> None:
        """Store the files of the model with it; none of a model that no other library knows. It may be repeated."""
        for rest in directory.glob(f"{_PARTIAL}*"):  # of a process that was killed
            shutil.rmtree(rest)
        module, _, function = export.function.partition(":")
        with TemporaryDirectory(dir=directory, prefix=_PARTIAL) as folder:
            to = Path(folder) / "model"
            try:
                getattr(import_module(module), function)(export.run_dir, model.tags[PATH_TAG].rpartition("/")[2], to)
            except UsageError as error:
                logger.warning("the registered model of run %s has no files: %s", self._run_id, error.message)
                return
            self._client.log_model_artifacts(model.model_id, str(to))
        if EXTERNAL_TAG in model.tags:
            self._client.delete_logged_model_tag(model.model_id, EXTERNAL_TAG)

    def _known_version(self, name: str, model: LoggedModel) -> str | None:
        """The model's version from an earlier attempt."""
        for known in self._client.search_model_versions(f"name = '{name}' AND run_id = '{self._tracked_id}'"):
            if known.tags.get(SEQ_TAG) == model.tags[SEQ_TAG]:
                return str(known.version)
        return None

    def _new_version(self, name: str, model: LoggedModel) -> str:
        tags = {PATH_TAG: model.tags[PATH_TAG], STEP_TAG: model.tags[STEP_TAG], SEQ_TAG: model.tags[SEQ_TAG]}
        made = self._client.create_model_version(
            name, model.artifact_location, run_id=self._tracked_id, tags=tags, model_id=model.model_id
        )
        return str(made.version)

    def _find_or_create(self, checkpoint: Checkpoint) -> LoggedModel:
        for known in self._all(f" AND tags.`{SEQ_TAG}` = '{checkpoint.seq}'"):
            return known
        tags = {
            EXTERNAL_TAG: "true",
            FATE_TAG: Fate.STORED.value,
            PATH_TAG: checkpoint.path,
            SEQ_TAG: str(checkpoint.seq),
            STEP_TAG: str(checkpoint.step),
        }
        return self._client.create_logged_model(
            self._experiment_id,
            name=f"{self._run_id}-step-{checkpoint.step:08d}",
            source_run_id=self._tracked_id,
            tags=tags,
            model_type=MODEL_TYPE,
        )

    def _all(self, condition: str = "") -> Iterator[LoggedModel]:
        """The run's models that this class created, including those that are not ready yet."""
        token: str | None = None
        while True:
            page = self._client.search_logged_models(
                [self._experiment_id],
                filter_string=f"source_run_id = '{self._tracked_id}'{condition}",
                max_results=_PAGE,
                page_token=token,
            )
            yield from (model for model in page if FATE_TAG in model.tags)
            token = page.token
            if not token:
                return
