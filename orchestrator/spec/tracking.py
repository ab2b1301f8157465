"""The `tracking` section: destination of metrics, and registration of the last checkpoint there."""

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from orchestrator.spec.keys.section import Broken, Section, refuse

SinkName = Literal["tensorboard", "wandb"]


def _tracking_uri(uri: str) -> str:
    if not re.fullmatch(r"sqlite:////.+|postgresql(\+psycopg2)?://.+|https?://.+|databricks(://.+)?|file:///.+", uri):
        raise refuse(
            "must be sqlite:////ABSOLUTE/PATH.db, postgresql://HOST/DATABASE, the http(s):// address of an MLflow "
            "server, databricks, or file:///ABSOLUTE/DIRECTORY"
        )
    return uri


def _registered_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.-]*", name):
        raise refuse("must begin with a letter or digit and hold only these, blanks, and _ . -")
    return name


def _alias(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or re.fullmatch(r"v\d+|latest", name, re.IGNORECASE):
        raise refuse(
            "must begin with a letter and hold only letters, digits, _ and -; v1, v2, ... and latest are MLflow's own"
        )
    return name


class TrackingSpec(Section):
    """Destination of metrics."""

    uri: Annotated[str, AfterValidator(_tracking_uri)] | None = Field(
        default=None,
        description="MLflow's database or server: sqlite:////PATH.db, postgresql://HOST/DATABASE, http(s)://ADDRESS. "
        "null: MLFLOW_TRACKING_URI where it is set at submission, else an SQLite database in the run storage. "
        "file:///DIRECTORY needs MLFLOW_ALLOW_FILE_STORE=true there, as MLflow no longer maintains these files. Put no "
        "password here.",
    )
    experiment: str = Field(
        default="orchestrator",
        min_length=1,
        max_length=200,
        description="Name of the MLflow experiment. Left out: MLFLOW_EXPERIMENT_NAME where it is set at submission.",
    )
    sinks: list[SinkName] = Field(
        default=[],
        description="Where metrics go beside MLflow: tensorboard writes event files, wandb an offline run (it needs "
        "`pip install wandb` where the run's controller is). Both into tracking/ of the run's directory.",
    )
    tags: dict[str, str] = Field(
        default={},
        description="Tags of the MLflow run. A submission adds mlflow.user, and the job file with the commit of its "
        "directory as mlflow.source.*, unless they are given.",
    )
    register_as: Annotated[str, Field(max_length=200), AfterValidator(_registered_name)] | None = Field(
        default=None,
        description="If the run succeeds, its newest checkpoint becomes a version of this registered model. Its files "
        "are those of `model export` if transformers knows the model: `models:/NAME@ALIAS` loads them.",
    )
    alias: Annotated[str, Field(max_length=200), AfterValidator(_alias)] | None = Field(
        default=None, description="Alias that this version gets. Needs register_as."
    )

    def broken_rules(self) -> Iterator[Broken]:
        if len(set(self.sinks)) < len(self.sinks):
            yield Broken((("sinks",),), f"sinks names one twice: {', '.join(self.sinks)}")
        if self.alias is not None and self.register_as is None:
            yield Broken((("alias",), ("register_as",)), f"alias needs register_as; got {self.alias!r} and null")
