"""Node pools: the nodes whose labels match a job's selector, on which its workers may live."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from orchestrator.errors import JobDoesNotFit
from orchestrator.protocol.scaling import ScalingView
from orchestrator.spec.keys.labels import NODE_ID, Condition

Labels = Mapping[str, str]
MAX_SHOWN = 8  # values of a label, in an error


def matches(labels: Labels, selector: Labels) -> bool:
    """Whether a node's labels match a `workers.label_selector`, as Ray decides when it places a worker. A missing label
    equals none of the values."""
    conditions = [(labels.get(key), Condition.of(text)) for key, text in selector.items()]
    return all(which is not None and (label in which.values) != which.is_negated for label, which in conditions)


def pool_of(selector: Labels, nodes: Mapping[str, Labels]) -> set[str]:
    """The nodes that match, by id."""
    return {node for node, labels in nodes.items() if matches(labels, selector)}


def confined(run: ScalingView, nodes: Mapping[str, Labels]) -> ScalingView:
    """The run, with the nodes outside of its pool added to those that it avoids."""
    outside = nodes.keys() - pool_of(run.selector, nodes)
    return replace(run, avoid=(*run.avoid, *sorted(outside)))


def check_pool(selector: Labels, nodes: Mapping[str, Labels]) -> None:
    """Raises JobDoesNotFit if no node of the cluster matches."""
    if pool_of(selector, nodes):
        return
    raise JobDoesNotFit(
        f"workers.label_selector {shown(selector)} fits none of the cluster's {len(nodes)} nodes; "
        f"labels there are: {labels_shown(nodes.values())}",
        remedy="Name labels that nodes have, or add such nodes first (`ray start --labels KEY=VALUE`).",
        unchanged="Nothing was started.",
    )


def shown(selector: Labels) -> str:
    return "{" + ", ".join(f"{key}: {condition}" for key, condition in selector.items()) + "}"


def labels_shown(nodes: Collection[Labels]) -> str:
    """All labels of these nodes but their ids, by key."""
    values: dict[str, set[str]] = {}
    for labels in nodes:
        for key, value in labels.items():
            values.setdefault(key, set()).add(value)
    values.pop(NODE_ID, None)
    return "; ".join(f"{key}: {_few(sorted(found))}" for key, found in sorted(values.items())) or "none"


def _few(values: list[str]) -> str:
    more = len(values) - MAX_SHOWN
    return ", ".join(values[:MAX_SHOWN]) + (f" and {more} more" if more > 0 else "")
