"""Which nodes a selector means; that Ray means the same is seen in tests/integration/test_pools.py."""

from dataclasses import replace

import pytest

from orchestrator.errors import JobDoesNotFit
from orchestrator.policy.cluster.node_pools import check_pool, confined, labels_shown, matches, pool_of
from orchestrator.protocol.scaling import ScalingView

NODES = {
    "n0": {"ray.io/node-id": "n0", "pool": "a", "zone": "east"},
    "n1": {"ray.io/node-id": "n1", "pool": "b", "zone": "east"},
    "n2": {"ray.io/node-id": "n2"},
}


@pytest.mark.parametrize(
    ("selector", "nodes"),
    [
        ({}, {"n0", "n1", "n2"}),
        ({"pool": "a"}, {"n0"}),
        ({"pool": "!a"}, {"n1", "n2"}),
        ({"pool": "in(a,b)"}, {"n0", "n1"}),
        ({"pool": "!in(a,b)"}, {"n2"}),
        ({"pool": "x"}, set()),
        ({"nope": "!x"}, {"n0", "n1", "n2"}),
        ({"pool": "!a", "zone": "east"}, {"n1"}),
    ],
)
def test_a_selector_means_nodes(selector: dict[str, str], nodes: set[str]) -> None:
    assert pool_of(selector, NODES) == nodes


def test_what_is_no_condition_fits_nothing() -> None:
    assert not matches({"pool": "in()"}, {"pool": "in()"})


def test_a_run_avoids_what_is_outside_of_its_pool() -> None:
    run = ScalingView("run", "manual", {}, 1, 1, 1, avoid=("n0",))
    assert confined(run, NODES).avoid == ("n0",)
    assert confined(replace(run, selector={"pool": "!in(a,b)"}), NODES).avoid == ("n0", "n0", "n1")


def test_a_selector_that_fits_no_node_is_an_error_with_the_existing_labels() -> None:
    check_pool({"pool": "a"}, NODES)
    with pytest.raises(
        JobDoesNotFit, match=r"\{pool: x\} fits none of the cluster's 3 nodes; labels there are: pool: "
    ):
        check_pool({"pool": "x"}, NODES)
    assert labels_shown(list(NODES.values())) == "pool: a, b; zone: east"
    assert labels_shown([{"ray.io/node-id": "n"}]) == "none"
    assert labels_shown([{"n": str(number)} for number in range(11)]).endswith("and 3 more")
