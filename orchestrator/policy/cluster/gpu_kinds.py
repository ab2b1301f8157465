"""Kinds of GPUs on a cluster's nodes, as Ray names them in labels and resources (`ray.util.accelerators`)."""

from collections import Counter
from collections.abc import Iterable, Mapping

from orchestrator.errors import UsageError
from orchestrator.policy.cluster.node_pools import Labels
from orchestrator.spec.keys.labels import Condition

LABEL = "ray.io/accelerator-type"
RESOURCE = "accelerator_type:"  # before a kind, among a node's resources

# Memory in GiB of the largest card of each kind. A kind that isn't here is not compared with anything.
MEMORY_GIB = {
    "K80": 12,
    "P4": 8,
    "P100": 16,
    "T4": 16,
    "V100": 32,
    "A10G": 24,
    "L4": 24,
    "L40S": 48,
    "A100": 80,
    "A100-40G": 40,
    "A100-80G": 80,
    "RTX-PRO-6000": 96,
    "H20": 141,
    "H100": 94,
    "H200": 141,
    "B200": 192,
    "GB200": 192,
    "B300": 288,
    "GB300": 288,
}


def largest_memory(selector: Labels) -> tuple[str, int] | None:
    """The kind with the largest memory among those that a `workers.label_selector` names, and its bytes; None if it
    names none, or admits any whose memory is not known."""
    condition = Condition.of(selector.get(LABEL, ""))
    if condition is None or condition.is_negated or not {*condition.values} <= MEMORY_GIB.keys():
        return None
    kind = max(condition.values, key=lambda kind: MEMORY_GIB[kind])
    return kind, MEMORY_GIB[kind] << 30


def kinds_of(nodes: Iterable[Mapping[str, float]]) -> Counter[str]:
    """Number of GPUs by kind, from the resources of nodes. Those of a node that names no kind are left out."""
    found: Counter[str] = Counter()
    for resources in nodes:
        for kind in (name.removeprefix(RESOURCE) for name in resources if name.startswith(RESOURCE)):
            found[kind] += int(resources.get("GPU", 0))
    return +found


def check_alike(kinds: Mapping[str, int], is_exact: bool) -> str:
    """A warning if workers may get GPUs of several kinds; empty if not.

    Raises:
        UsageError: they may, and the run is exact.
    """
    if len(kinds) < 2:
        return ""
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    most = max(kinds, key=lambda kind: kinds[kind])
    message, remedy = f"the nodes' GPUs are of {len(kinds)} kinds: {listed}", f"Choose one, as {{{LABEL}: {most}}}"
    if is_exact:
        raise UsageError(
            f"{message}; the bits of an exact run depend on the kind",
            remedy=f"{remedy}, in workers.label_selector.",
            unchanged="Nothing was started.",
        )
    return f"{message}; a step takes as long as on the slowest. {remedy}, in workers.label_selector"
