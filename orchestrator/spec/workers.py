"""The `workers` section: the number of workers of a run, and its limits."""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from orchestrator.spec.keys.labels import LabelSelector
from orchestrator.spec.keys.section import REFERENCE, Broken, Path, Section, refuse

# Variables that change how a process is loaded, or how Ray and we behave: by prefix, and by full name.
REFUSED_ENVS = ("LD_", "DYLD_", "PYTHON", "RAY_", "ORCHESTRATOR_")
REFUSED_NAMES = ("BASH_ENV", "ENV", "GCONV_PATH", "GLIBC_TUNABLES", "LOCPATH", "OPENSSL_CONF", "OPENSSL_MODULES")


class ScheduledScale(Section):
    """A change of the number of workers at a known step."""

    at_step: int = Field(ge=1, description="The first step (counted from 0) with the new number of workers.")
    workers: int = Field(ge=1, description="The number of workers from then on, within min..max.")


class WorkersSpec(Section):
    """Number of workers of the run, its limits, and standbys."""

    min: int = Field(default=1, ge=1, description="Fewest workers.")
    max: int = Field(
        default_factory=lambda known: known["min"], ge=1, description="Most workers. Default: the same as min."
    )
    initial: int = Field(
        default_factory=lambda known: known["min"], ge=1, description="Workers at the start. Default: min."
    )
    standby: int = Field(
        default=0,
        ge=0,
        description="Workers kept warm, with reserved resources, so that a rescale is fast. Beside a single worker, "
        "one of them keeps its snapshots.",
    )
    schedule: tuple[ScheduledScale, ...] = Field(
        default=(),
        description="Changes of the number of workers at known steps, in ascending order.",
    )

    label_selector: LabelSelector = Field(
        default={},
        description='Labels of the nodes that workers may run on, as in {pool: gpu, zone: "in(a,b)", spot: "!yes"}: '
        "value, !value, in(a,b) or !in(a,b). All must hold; {} is any node.",
    )

    def broken_rules(self) -> Iterator[Broken]:
        bounds: tuple[Path, ...] = (("min",), ("max",))
        if self.min > self.max:
            yield Broken(bounds, f"min must be at most max; got {self.min} and {self.max}")
            return
        within = f"must be within min..max ({self.min}..{self.max})"
        if not self.min <= self.initial <= self.max:
            yield Broken((("initial",), *bounds), f"initial {within}; got {self.initial}")
        for i, change in enumerate(self.schedule):
            if not self.min <= change.workers <= self.max:
                yield Broken((("schedule", i, "workers"), *bounds), f"workers {within}; got {change.workers}")
        for i, (earlier, later) in enumerate(pairwise(self.schedule), start=1):
            if later.at_step <= earlier.at_step:
                rule = f"at_step must be greater than in the entry before; got {later.at_step} after {earlier.at_step}"
                yield Broken((("schedule", i, "at_step"), ("schedule", i - 1, "at_step")), rule)


class WorkerRange(Section):
    """Numbers of workers from `min` to `max`."""

    min: int = Field(ge=1, description="Fewest workers.")
    max: int = Field(default_factory=lambda known: known["min"], ge=1, description="Most workers. Default: min.")

    def broken_rules(self) -> Iterator[Broken]:
        if self.min > self.max:
            yield Broken((("min",), ("max",)), f"min must be at most max; got {self.min} and {self.max}")


def _workers(value: Any) -> Any:
    """Expand the short forms: 2, "2" and "2..4"."""
    if isinstance(value, dict) and isinstance(value.get("schedule"), list):
        return {
            **value,
            "schedule": tuple(value["schedule"]),
        }  # values from this validator no longer count as JSON input to pydantic
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    match = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", str(value).replace(" ", ""))
    if match is None:
        raise refuse('must be a number of workers (2), a range ("2..4") or a mapping {min, max, ...}')
    low, high = match[1], match[2] or match[1]
    return {"min": int(low), "max": int(high)}


Workers = Annotated[WorkersSpec, BeforeValidator(_workers, json_schema_input_type=WorkersSpec | int | str)]
Range = Annotated[WorkerRange, BeforeValidator(_workers, json_schema_input_type=WorkerRange | int | str)]


# -- The `autoscale` section: automatic changes of the number of workers -----------------------------------------------

Policy = Literal["manual", "available", "stage", "throughput"]
MANUAL: Policy = "manual"
AVAILABLE: Policy = "available"
STAGE: Policy = "stage"
THROUGHPUT: Policy = "throughput"


class AutoscaleSpec(Section):
    """Control of the number of workers, within `workers.min` and `max` and the range of the current stage."""

    policy: Policy = Field(
        default=MANUAL,
        description="manual: by `orchestrator scale` and workers.schedule. available: as many as the cluster has "
        "room for. stage: as many as the stage names; Ray's autoscaler is asked for nodes for the most of them. "
        "throughput: one more at a time, as long as it adds enough; Ray's autoscaler is asked for nodes.",
    )
    cooldown_s: float = Field(default=30.0, ge=0, description="Seconds between two automatic changes that add workers.")
    min_gain: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="throughput: least gain of a further worker, as a share of what each contributed before. If it "
        "adds less, it is removed again.",
    )


# -- The `resources` section: Ray's reservation for each worker --------------------------------------------------------

AUTO = "auto"
BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _memory(size: str) -> str:
    if not re.fullmatch(rf"\d{{1,9}}(\.\d{{1,9}})? ?({'|'.join(BYTES)})", size):
        raise refuse(f'must be a number and a unit ({", ".join(BYTES)}), as in "2GiB"')
    return size


def _gpus(value: Any) -> Any:
    if value != AUTO and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
        raise refuse("must be a number from 0 to 1, or auto")
    return value


GpusForm = Annotated[float, Field(ge=0, le=1)] | Literal["auto"]
Gpus = Annotated[float | str, BeforeValidator(_gpus, json_schema_input_type=GpusForm)]


class ResourcesSpec(Section):
    """Ray's reservation for each worker, standbys included. Logical: the operating system enforces nothing."""

    cpus: float = Field(default=1, gt=0, description="CPUs of each worker; fractions are allowed.")
    gpus: Gpus = Field(
        default=AUTO,
        description="GPUs of each worker: one, none, or a part of one, the rest of which other jobs may use. A worker "
        "trains on one GPU; to use more, add workers, of which a node may hold several. auto: one if the nodes have "
        "enough for workers.min when the run is submitted, else none; the run keeps what it got.",
    )
    memory: Annotated[str, AfterValidator(_memory)] | None = Field(
        default=None,
        description='Memory of each worker, as in "2GiB". A job whose workers would need more is refused. null: '
        "no reservation.",
    )

    @property
    def num_gpus(self) -> float:
        """GPUs of each worker; none with auto, which a submission replaces."""
        return 0.0 if isinstance(self.gpus, str) else self.gpus

    def on_nodes(self, least_workers: int, gpus_of_nodes: Iterable[float]) -> "ResourcesSpec":
        """The section of a run on these nodes: with a number in place of auto."""
        if self.gpus != AUTO:
            return self
        enough = sum(int(gpus) for gpus in gpus_of_nodes) >= least_workers
        return self.model_copy(update={"gpus": 1.0 if enough else 0.0})

    @property
    def memory_bytes(self) -> int | None:
        if self.memory is None:
            return None
        unit = self.memory.lstrip("0123456789. ")
        return int(float(self.memory.removesuffix(unit)) * BYTES[unit])

    @property
    def request(self) -> dict[str, float]:
        """What each worker reserves, by Ray's names, without what it doesn't need."""
        amounts = {"CPU": self.cpus, "GPU": self.num_gpus, "memory": float(self.memory_bytes or 0)}
        return {name: amount for name, amount in amounts.items() if amount}


def broken_environment(envs: Mapping[str, str], secrets: Mapping[str, str]) -> Iterator[Broken]:
    """The rules between the workers' environment variables that are broken."""
    for name, reference in secrets.items():
        if not re.fullmatch(REFERENCE, reference):
            yield Broken((("secrets", name),), "must be file:PATH with an absolute path, or env:NAME")
        if name in envs:
            yield Broken((("secrets", name), ("envs", name)), f"{name} is in envs too: leave one out")
    of_both = (("envs", envs), ("secrets", secrets))
    for section, name, value in ((section, *item) for section, values in of_both for item in values.items()):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield Broken(((section, name),), "a name must be of letters, digits and _, and not begin with a digit")
        elif name.upper().startswith(REFUSED_ENVS) or name.upper() in REFUSED_NAMES:
            refused = ", ".join([*(f"{prefix}*" for prefix in REFUSED_ENVS), *REFUSED_NAMES])
            rule = f"{refused} must not be set: they change how processes are loaded, or how Ray behaves"
            yield Broken(((section, name),), rule)
        elif name == "OMP_NUM_THREADS":
            yield Broken(
                ((section, name),),
                "must not be set: workers share the cores of their node, as many as run at first",
            )
        elif "\0" in value:
            yield Broken(((section, name),), "a value must not hold a NUL character")
