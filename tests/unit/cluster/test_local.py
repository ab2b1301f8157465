"""Starting a local cluster, as far as it needs no Ray."""

from orchestrator.cluster.local_head import free_ports


def test_no_two_ports_of_a_cluster_are_the_same() -> None:
    """Chosen one by one, two of so many would be: Ray does not start then."""
    for _ in range(30):
        assert len(set(free_ports(100))) == 100
