"""Preparation of a job for submission: read, renamed, paths made absolute, checked as far as possible here."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import ValidationError

from orchestrator.checkpoint.hf.adapters import open_adapter
from orchestrator.checkpoint.hf.pretrained import check_base, open_pretrained, weights_digest
from orchestrator.checkpoint.hf.pretrained import resolved as resolved_model
from orchestrator.data.corpus.files import KINDS, suffix_of, text_files
from orchestrator.data.prepare.job_store import check_vocabulary
from orchestrator.data.prepare.request import load_tokenizer
from orchestrator.data.rows.prepare_rows import check_first_chats
from orchestrator.errors import DataError, NameTaken, UsageError
from orchestrator.policy.estimate.memory_check import check_memory, is_checked
from orchestrator.spec.data import DataSpec
from orchestrator.spec.job import JobSpec
from orchestrator.spec.job_file.loading import load_job
from orchestrator.spec.keys.section import with_code_dirs
from orchestrator.spec.model import ModelSpec
from orchestrator.storage.backends.location import location_of
from orchestrator.submission.param_listing import plan_of
from orchestrator.submission.provenance import with_provenance
from orchestrator.submission.teacher_choice import with_teacher
from orchestrator.submission.user_code import check_own_code, with_packages


@dataclass(frozen=True)
class Submission:
    """Input of the Scheduler: the job with every path absolute, the text that the user wrote, and the packages of the
    job's own code, by their digests."""

    spec: JobSpec
    text: str
    code: Mapping[str, bytes] = field(repr=False)

    @property
    def run_dir(self) -> str:
        return str(location_of(self.spec.storage) / self.spec.name)

    @property
    def job_json(self) -> str:
        return self.spec.model_dump_json(by_alias=True)


def order_of(job: JobSpec | str | os.PathLike[str], name: str | None, overrides: Sequence[str] = ()) -> Submission:
    """Read, resolve and check a job as far as possible here; `overrides` of a job file as in `load_job`."""
    if isinstance(job, JobSpec):
        spec, text = job, yaml.safe_dump(job.model_dump(mode="json", by_alias=True), sort_keys=False)
    else:
        spec, text = load_job(job, overrides), Path(job).read_text(encoding="utf-8")
        text += "".join(f"\n# --set {override}" for override in overrides)
    if name is not None:
        spec = _renamed(spec, name)
    run_dir = location_of(spec.storage) / spec.name
    if isinstance(run_dir, Path) and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise NameTaken(
            f"{run_dir} exists already; a run's name must be new in its storage",
            remedy="Choose another name (--name) or storage, or move that directory away.",
            unchanged="Nothing was started.",
        )
    spec = with_provenance(resolved(spec), None if isinstance(job, JobSpec) else Path(job))
    spec, code = with_packages(spec)
    check_own_code(spec, code)
    if spec.has_chats:
        check_first_chats(spec)
    # The plan takes a process with torch, some seconds, so it is made only if something may be refused by it.
    if is_checked(spec) or spec.train.names_parameters:
        check_memory(spec, plan_of(spec))
    return Submission(spec, text, code)


def check_job(job: JobSpec | str | os.PathLike[str], name: str | None = None, overrides: Sequence[str] = ()) -> JobSpec:
    """The job, checked as far as is possible without a cluster. Raises what `OrchestratorClient.submit` raises."""
    return order_of(job, name, overrides).spec


def resolved(spec: JobSpec) -> JobSpec:
    """The job as run storage keeps it: self-contained, every path absolute. Raises as `with_pretrained` and
    `with_teacher`, and DataError if the corpus doesn't exist."""
    spec = with_teacher(with_pretrained(spec))
    changes = {
        "storage": str(location_of(spec.storage)),
        "data": _absolute_data(spec.data),
    }
    return with_code_dirs(spec.model_copy(update=changes), _absolute)


def with_pretrained(spec: JobSpec) -> JobSpec:
    """The job with sizes and tokenizer of the model in `model.init_from`, so that it is self-contained.

    Raises:
        UsageError: the directory's architecture or sizes differ from the job's.
        CheckpointCorrupt: its weights are not complete.
        DataError: the tokenizer can't be used, or has more tokens than the model.
    """
    model, tokenizer = spec.model, spec.data.tokenizer
    if model.init_from is not None:
        directory = Path(model.init_from).expanduser().absolute()
        model = resolved_model(model, directory)
        if model.is_native:  # else the process does it that tries the model, and has transformers
            open_pretrained(directory).check(model)
        model = with_adapters(model)
        tokenizer = tokenizer or str(directory / "tokenizer.json")
    elif model.config:
        model = resolved_model(model)
    if tokenizer is None:
        return spec.model_copy(update={"model": model})
    path = Path(tokenizer).expanduser().absolute()
    check_vocabulary(model.vocab_size, load_tokenizer(path).vocab_size)
    data = spec.data.model_copy(update={"tokenizer": str(path)})
    return spec.model_copy(update={"model": model, "data": data})


def with_adapters(model: ModelSpec) -> ModelSpec:
    """The model section with the digest of the weights beside its adapters, if it has some.

    Raises:
        UsageError, CheckpointCorrupt: the weights differ from those of the digest that it has; or adapters that are
            to be trained further don't fit.
    """
    lora = model.lora
    if lora is None or model.init_from is None:
        return model
    check_base(model)
    place = None if lora.init_from is None else _absolute(lora.init_from)
    digest = lora.base_sha256 or weights_digest(Path(model.init_from))
    model = model.model_copy(update={"lora": lora.model_copy(update={"init_from": place, "base_sha256": digest})})
    if place is not None:
        open_adapter(model).check(model)
    return model


def _absolute_data(data: DataSpec) -> DataSpec:
    if data.entrypoint is not None:
        return data
    template = None if data.chat_template is None else _absolute(data.chat_template)
    return data.model_copy(update={"source": _absolute_source(data.source), "chat_template": template})


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _renamed(spec: JobSpec, name: str) -> JobSpec:
    try:
        return JobSpec.model_validate(spec.model_dump(by_alias=True, exclude_unset=True) | {"name": name})
    except ValidationError as error:
        raise UsageError(
            f"{name!r} can't be a run's name: {error.errors()[0]['msg']}", unchanged="Nothing was started."
        ) from error


def _absolute_source(source: str) -> str:
    if source.startswith("builtin:"):
        return source
    path = Path(source).expanduser().absolute()
    if not path.exists():
        wrong = "does not exist"
    elif path.is_dir():
        wrong = "" if text_files(path) else f"holds no file of {KINDS}"
    else:
        wrong = "" if suffix_of(path) else f"is none of {KINDS}"
    if wrong:
        raise DataError(
            f"data.source {path} {wrong}",
            remedy="Name a folder of such files, one of them, or builtin:stdlib.",
            unchanged="Nothing was started.",
        )
    return str(path)
