"""What determines the bits of a computation besides the job: pinned and reported where `train.determinism` is exact.

The contract: the same job and the same fingerprint give the same bits.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch

from orchestrator.requirements import used_versions

NO_CODE: Mapping[str, str] = {}
COMPILER_FLAGS = ("TORCHINDUCTOR_", "TORCH_INDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_")
NO_FLAGS = (
    "TORCHINDUCTOR_CACHE_DIR=",
    "TORCHINDUCTOR_COMPILE_THREADS=",
)  # where the code is and how it comes, not which


def pin(device: torch.device) -> None:
    """Make torch use only operations that give the same bits at every call.

    Settings that must exist before libraries are loaded are in a worker's environment
    (`orchestrator.controller.worker_group`).
    """
    torch.backends.cudnn.benchmark = False  # it would choose algorithms by measured time
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)


def fingerprint(
    device: torch.device, libraries: Sequence[str] = (), code: Mapping[str, str] = NO_CODE, compiler: str = ""
) -> str:
    """Versions, kind of processor and threads, as JSON. Threads matter, as they split sums into parts.

    Args:
        libraries: further ones that compute, beside the packages that the job names.
        code: digests of the job's own code, by its directories.
        compiler: of the model's parts, if they are compiled; its settings in the environment are added.
    """
    found = {
        "orchestrator": version_of_ours(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "mkl": version_of_mkl(),
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    found |= {name: version(name) for name in libraries}
    if packages := used_versions():
        found["pip"] = ", ".join(packages)
    if code:
        found["code"] = ", ".join(sorted(code.values()))
    if compiler:
        flags = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(COMPILER_FLAGS))
        found["compiler"] = " ".join((compiler, *(flag for flag in flags if not flag.startswith(NO_FLAGS))))
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda or ""}
    return json.dumps(found, sort_keys=True)


def kind_of_gpu(device: torch.device) -> str:
    """The part of a fingerprint that matters to speed, as JSON: the kind of GPU; empty on a processor."""
    return json.dumps({"gpu": torch.cuda.get_device_name(device)}) if device.type == "cuda" else ""


def version_of_ours() -> str:
    """Version of this package; empty if it is importable but not installed."""
    with suppress(PackageNotFoundError):
        return version("elastic-orchestrator")
    return ""


def version_of_mkl() -> str:
    """Version of the MKL that torch was built with; empty for another library."""
    lines = (line.strip("- ") for line in torch.__config__.show().splitlines())
    return next((line for line in lines if "Math Kernel Library" in line), "")


def processor() -> str:
    """Name of the processor, as reported by the system; libraries choose their code by it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("model name", "Model", "Hardware"):
                    return value.strip()
    return platform.processor() or platform.machine()
