"""The job file as frozen, validated values.

`orchestrator.spec.job_file.loading` reads them from YAML with errors that name file, line and column. When constructed
directly, as in `JobSpec(name="try", workers=WorkersSpec(max=3))`, a bad value raises pydantic's `ValidationError`. Only
`name` has no default.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from orchestrator.spec.communication import CommunicationSpec, broken_communication
from orchestrator.spec.curriculum import CurriculumSpec, broken_experts, broken_sizes, experts_by_stage
from orchestrator.spec.data import BY_DOCUMENT, DataSpec, broken_outputs, broken_rows, broken_training, format_of
from orchestrator.spec.distill import DistillSpec, broken_distillation
from orchestrator.spec.exits import broken_exit_task
from orchestrator.spec.fault_tolerance import (
    CheckpointSpec,
    Protection,
    ProtectionSpec,
    RecoverySpec,
    VerifySpec,
    broken_protection,
    broken_verification,
)
from orchestrator.spec.keys.section import (
    Broken,
    Path,
    Section,
    key_reference,
    refuse,
    requirement,
    storage_place,
)
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.moe.experts import (
    OF_PLACEMENT,
    ExpertsSpec,
    ScheduledExperts,
    broken_placement,
    broken_schedule,
    measured_steps,
)
from orchestrator.spec.own_callbacks import CallbackSpec, broken_callbacks
from orchestrator.spec.pretrained.lora import TRAINED
from orchestrator.spec.pruning import broken_pruning
from orchestrator.spec.quantization import broken_quantization
from orchestrator.spec.task import OF_CHATS, TEXT, DataFormat, TaskSetting, TaskSpec
from orchestrator.spec.tracking import TrackingSpec
from orchestrator.spec.train import TrainSpec, broken_compilation
from orchestrator.spec.workers import AutoscaleSpec, ResourcesSpec, Workers, WorkersSpec, broken_environment

LOWEST_PRIORITY, HIGHEST_PRIORITY = -100, 100
RUN_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")


def _name(name: str) -> str:
    if not RUN_NAME.fullmatch(name):
        raise refuse("must be 1 to 40 of a-z, 0-9 and -, begin with a letter and not end with -")
    return name


class EvalSpec(Section):
    """Validation on the held-out documents."""

    every: int | None = Field(default=None, ge=1, description="Steps between two validations. null: no validation.")
    rows: int = Field(default=64, ge=1, description="Largest number of held-out rows that each validation reads.")


Storage = Annotated[
    str,
    AfterValidator(storage_place),
    BeforeValidator(lambda path: "./runs" if path is None else path, json_schema_input_type=str | None),
]


class JobSpec(Section):
    """A training job."""

    model_config = ConfigDict(title="Job file", json_schema_extra={"required": ["schema", "name"]})

    version: Literal["v1"] = Field(default="v1", alias="schema", description="Version of this format.")
    name: Annotated[str, AfterValidator(_name)] = Field(
        description="Name of the run, unique in its cluster and storage: up to 40 of a-z, 0-9 and -."
    )
    workers: Workers = Field(
        default=WorkersSpec(), description='Number of workers: 2, a range "2..4", or a mapping. Default: 1.'
    )
    priority: int = Field(
        default=0,
        ge=LOWEST_PRIORITY,
        le=HIGHEST_PRIORITY,
        description="Priority when several runs share a cluster: a higher one shrinks lower ones to their workers.min, "
        "and pauses them where that is not enough.",
    )
    autoscale: AutoscaleSpec = Field(default=AutoscaleSpec(), description="Automatic changes of the number of workers.")
    resources: ResourcesSpec = Field(default=ResourcesSpec(), description="Resources that each worker reserves.")
    task: TaskSetting = Field(default=TaskSpec(), description="What is learned: a name, or a mapping.")
    model: ModelSpec = Field(default=ModelSpec(), description="The model.")
    experts: ExpertsSpec = Field(default=ExpertsSpec(), description="The routed experts, while they train.")
    train: TrainSpec = Field(default=TrainSpec(), description="The training.")
    distill: DistillSpec | None = Field(
        default=None, description="A teacher to learn from. null: only the task's targets are learned."
    )
    communication: CommunicationSpec = Field(
        default=CommunicationSpec(), description="Transfer of data between workers in a step."
    )
    eval: EvalSpec = Field(default=EvalSpec(), description="Validation.")
    data: DataSpec = Field(default=DataSpec(), description="The training data.")
    curriculum: CurriculumSpec | None = Field(
        default=None, description="Stages of difficulty. null: all rows in a random order, epoch after epoch."
    )
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="Durable copies of the training state.")
    protection: Protection = Field(
        default=ProtectionSpec(), description="Copies of the training state in the memory of other workers."
    )
    recovery: RecoverySpec = Field(default=RecoverySpec(), description="Response to failures.")
    verify: VerifySpec = Field(default=VerifySpec(), description="Replay of steps, to compare results.")
    callbacks: list[CallbackSpec] = Field(
        default=[], description="Code of your own that follows the committed steps, and may scale or end the run."
    )
    tracking: TrackingSpec = Field(default=TrackingSpec(), description="Metrics.")
    storage: Storage = Field(
        default="./runs",
        description="Run storage: a directory, relative to the current one, or the URL of a bucket: s3://BUCKET/PATH, "
        "gs://BUCKET/PATH or az://CONTAINER/PATH. null: ./runs.",
    )
    envs: dict[str, str] = Field(
        default={},
        description="Environment variables of the workers. Visible to everyone with access to the cluster: put no "
        "secret here. Refused are variables that change how a process is loaded (LD_*, PYTHON*, GLIBC_TUNABLES and "
        "such) or how Ray and we behave (RAY_*, ORCHESTRATOR_*), and OMP_NUM_THREADS, set from cores and workers.",
    )
    pip: list[Annotated[str, AfterValidator(requirement)]] = Field(
        default=[],
        description="Packages that your code needs, as pip names them: NAME==VERSION, or NAME @ URL. They are "
        "installed once per node, beside the environment, whose packages keep their versions.",
    )
    secrets: dict[str, str] = Field(
        default={},
        description="Environment variables of the workers whose values are read on each worker's node: file:PATH, "
        "absolute, or env:NAME, from Ray's own environment there. The job holds no value, and logs don't show it.",
    )

    code: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        default={},
        description="Set at submission: the SHA-256 of each `code_dir` as it was then, which the run's storage has.",
    )
    signing_key: Annotated[str | None, AfterValidator(key_reference)] = Field(
        default=None,
        description="Key with which the run's journal is signed, so that storage that others can write to can't change "
        "what the run resumes from: file:PATH, absolute, or env:NAME, read where the job is submitted or resumed, or "
        "auto, a key of this user that is made if there is none yet. null: it isn't signed.",
    )

    @model_validator(mode="after")
    def _trains_adapters(self) -> Self:
        """Write down what is trained where the model has adapters and nothing else is asked for."""
        if self.model.lora is not None and "trainable" not in self.train.model_fields_set:
            object.__setattr__(self, "train", self.train.model_copy(update={"trainable": TRAINED}))
        return self

    @property
    def data_format(self) -> DataFormat:
        """What the data are."""
        return format_of(self.task, self.data)

    @property
    def has_rows(self) -> bool:
        """Whether the data are rows of arrays, each a sample by itself, and not tokens of one text."""
        return self.data_format != TEXT

    @property
    def has_chats(self) -> bool:
        """Whether the data are chats."""
        return self.data_format in OF_CHATS

    @property
    def has_tokens(self) -> bool:
        """Whether a tokenizer makes the model's inputs."""
        return not self.has_rows or self.has_chats

    @property
    def has_own_code(self) -> bool:
        """Whether the model or the task is not of this package."""
        return not self.model.is_native or self.task.entrypoint is not None

    @property
    def expert_schedule(self) -> tuple[ScheduledExperts, ...]:
        """Changes of the number of experts at known steps: those of `experts.schedule`, or those of stages."""
        return self.experts.schedule or tuple(experts_by_stage(self.curriculum).values())

    @property
    def most_experts(self) -> int:
        """The largest number of routed experts of a layer that the job has at any step."""
        return max(self.model.n_routed_experts, *(entry.num_experts for entry in self.expert_schedule), 1)

    @property
    def measured_steps(self) -> tuple[int, ...]:
        """The steps whose averages decide which experts stay at scheduled steps."""
        return measured_steps(self.expert_schedule, self.model.n_routed_experts)

    @property
    def keeps_saliency(self) -> bool:
        """Whether it is measured how much each expert adds to its tokens."""
        return self.experts.saliency or bool(self.measured_steps)

    def with_experts(self, num_experts: int) -> Self:
        """The job with as many routed experts in each MoE layer."""
        if num_experts == self.model.n_routed_experts:
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"n_routed_experts": num_experts})})

    def num_outputs(self, prepared: int = 0) -> int:
        """Rows of the model's last matrix: tokens of the vocabulary, or classes.

        Args:
            prepared: as many as the prepared data have; 0 before that: then the most that they may have.
        """
        return self.model.vocab_size or self.task.num_classes or prepared or self.data.vocab_size

    def broken_rules(self) -> Iterator[Broken]:
        yield from broken_callbacks(self.callbacks)
        yield from broken_rows(self.task, self.data, self.model)
        yield from broken_training(self.train, self.model, self.data_format, self.curriculum is not None)
        yield from broken_outputs(self.task, self.model)
        yield from broken_exit_task(self.model.exits, self.task)
        yield from broken_distillation(
            self.distill,
            self.task,
            self.model.is_native,
            self.curriculum is not None,
            self.data.row_format != BY_DOCUMENT,
        )
        yield from broken_pruning(
            self.train.pruning,
            None if self.model.is_native else self.model.origin,
            self.model.lora is not None,
            self.model.qk_norm == "all_heads",
            self.train.max_steps,
        )
        lora = self.model.lora
        yield from broken_quantization(
            self.train.quantization,
            None if self.model.is_native else self.model.origin,
            self.train.float8,
            0.0 if lora is None else lora.lora_dropout,
            self.train.prunes_units,
            self.model.attention_bias and self.train.prunes_heads,
        )
        stages = self.curriculum.stages if self.curriculum else ()
        yield from broken_compilation(
            self.train,
            None if self.model.is_native else self.model.origin,
            lora is not None,
            self.data_format == TEXT and self.data.row_format != BY_DOCUMENT,
            any(stage.sequence_length not in (None, self.train.sequence_length) for stage in stages),
        )
        for i, change in enumerate(self.workers.schedule):
            if change.at_step >= self.train.max_steps:
                rule = f"at_step must be less than train.max_steps; got {change.at_step} and {self.train.max_steps}"
                yield Broken((("workers", "schedule", i, "at_step"), ("train", "max_steps")), rule)
        yield from broken_sizes(self.workers, self.autoscale, self.curriculum)
        if self.checkpoint.keep_best and self.eval.every is None:
            rule = f"keep_best needs validations: set eval.every; got {self.checkpoint.keep_best} and null"
            yield Broken((("checkpoint", "keep_best"), ("eval", "every")), rule)
        most = self.workers.max + self.workers.standby
        if 0 < self.resources.num_gpus <= 0.5 and most > 1:
            rule = "two workers must not fit on one GPU, which NCCL refuses: more than half of one each, or one worker"
            got = f"; got {self.resources.num_gpus:g} and up to {most} workers with standbys"
            of_workers: tuple[Path, ...] = (("workers", "max"), ("workers", "standby"))
            yield Broken((("resources", "gpus"), *of_workers), rule + got)
        yield from broken_communication(self.communication, self.train, self.model)
        limits = {name: getattr(self.communication, name) for name in OF_PLACEMENT}
        yield from broken_placement(self.experts.placement, self.model.n_routed_experts, self.workers.max, limits)
        yield from broken_experts(self.curriculum, bool(self.experts.schedule))
        keys = self._keys_of_experts()
        yield from broken_schedule(
            self.expert_schedule,
            keys,
            self.model.n_routed_experts,
            self.model.num_experts_per_tok,
            self.train.max_steps,
            self.model.fixes_experts,
        )
        for name, limit in limits.items():
            if limit is not None and keys:
                rule = f"the number of experts must not change with communication.{name}: a token may find only clones"
                yield Broken((keys[0], ("communication", name)), f"{rule} of one expert")
        yield from broken_protection(self.protection, self.checkpoint, self.train.max_steps, self.workers.min)
        if self.train.is_exact:
            yield from self._inexact()
        if self.verify.every is not None:
            determinism, standby = self.train.determinism, self.workers.standby
            yield from broken_verification(self.verify, self.checkpoint, determinism, standby)
        for i, stage in enumerate(self.curriculum.stages if self.curriculum else ()):
            if stage.until is not None and stage.until.max_steps is not None and self.eval.every is None:
                rule = f"the end of stage {stage.name} needs validations: set eval.every; got null"
                yield Broken((("curriculum", "stages", i, "until"), ("eval", "every")), rule)
        yield from broken_environment(self.envs, self.secrets)

    def _keys_of_experts(self) -> tuple[Path, ...]:
        """The keys of `expert_schedule`."""
        if self.experts.schedule:
            return tuple(("experts", "schedule", i) for i in range(len(self.experts.schedule)))
        return tuple(("curriculum", "stages", i, "experts") for i in experts_by_stage(self.curriculum))

    def _inexact(self) -> Iterator[Broken]:
        """Settings that make results depend on the number of workers, the placement of experts, or measured time."""
        sent, compression = self.communication, self.communication.compression
        wrong: list[tuple[Path, object, str]] = []
        if compression.is_active:
            key: Path = ("communication", "compression")
            wrong.append((key, compression.scheme, "compression error depends on the number of workers"))
        if sent.tokens != "native":
            wrong.append((("communication", "tokens"), sent.tokens, "tokens that stay on a worker are not rounded"))
        for name in ("ranks_per_token", "nodes_per_token"):
            if (limit := getattr(sent, name)) is not None:
                wrong.append((("communication", name), limit, "a token's choice depends on the placement of experts"))
        if self.train.fits_memory:
            wrong.append((("train", "micro_batch_size"), "auto", "what fits is found by measuring"))
        for i, stage in enumerate(self.curriculum.stages if self.curriculum else ()):
            for name in ("validation_below", "plateau"):
                if stage.until is not None and (end := getattr(stage.until, name)) is not None:
                    key = ("curriculum", "stages", i, "until", name)
                    wrong.append((key, end, "the step at which its end is noticed depends on time"))
        for key, value, why in wrong:
            rule = f"must not be {value} where train.determinism is exact: {why}"
            yield Broken((key, ("train", "determinism")), rule)
