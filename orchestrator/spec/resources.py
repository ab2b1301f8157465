"""The `resources` section: what Ray reserves for each worker."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from orchestrator.spec.section import Section, refuse

BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _memory(size: str) -> str:
    if not re.fullmatch(rf"\d{{1,9}}(\.\d{{1,9}})? ?({'|'.join(BYTES)})", size):
        raise refuse(f'must be a number and a unit ({", ".join(BYTES)}), as in "2GiB"')
    return size


class ResourcesSpec(Section):
    """What Ray reserves for each worker, standbys included. Logical: nothing is enforced by the operating system."""

    cpus: float = Field(default=1, gt=0, description="CPUs of each worker; fractions are allowed.")
    gpus: float = Field(
        default=0,
        ge=0,
        le=1,
        description="GPUs of each worker: one, none, or a part of one, which other jobs may have the rest of. A worker "
        "trains on one GPU; for more of them have more workers, of which a node may hold several.",
    )
    memory: Annotated[str, AfterValidator(_memory)] | None = Field(
        default=None,
        description='Memory of each worker, as in "2GiB". A job whose workers would need more is refused. null: '
        "nothing is reserved.",
    )

    @property
    def memory_bytes(self) -> int | None:
        if self.memory is None:
            return None
        unit = self.memory.lstrip("0123456789. ")
        return int(float(self.memory.removesuffix(unit)) * BYTES[unit])
