"""Two workers on each of two hosts: what crosses the wire between them, by the ledger and by the hosts' interfaces."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from orchestrator.comm import traffic_meter
from orchestrator.elastic.expert_placement import ExpertPlacement
from orchestrator.engine.deepspeed.engine import DeepSpeedEngineAdapter
from orchestrator.engine.process_groups import connect
from orchestrator.model.moe.expert_parallel import ExpertParallelContext
from orchestrator.model.moe.layer import MoELayer
from orchestrator.model.transformer import MoELanguageModel
from orchestrator.protocol.usage import Traffic, TrafficKind
from orchestrator.spec.model import ModelSpec
from orchestrator.spec.train import TrainSpec
from tests.support.host_ranks import HostRanks
from tests.support.hosts import Hosts

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(Hosts.available() is not None, reason=str(Hosts.available())),
]

HOMES, NODES = (0, 0, 1, 1), ("host0", "host0", "host1", "host1")
SPEC = ModelSpec(
    hidden_size=256,
    num_attention_heads=1,
    num_key_value_heads=1,
    moe_intermediate_size=32,
    n_routed_experts=2,
    num_experts_per_tok=1,
)
TOKENS, PASSES = 512, 10
ROWS, LENGTH, VOCAB, STEPS = 8, 128, 512, 4  # of whole training steps
FRAMES = 1.08  # headers of Ethernet, IP and TCP, and acknowledgements


@pytest.fixture(scope="module")
def ranks() -> Iterator[HostRanks]:
    with Hosts(2) as hosts, HostRanks(hosts, HOMES) as ranks:
        yield ranks


def _exchange(
    rank: int, size: int, store: Store, prefix: str, address: str, placement: ExpertPlacement
) -> tuple[Traffic, int]:
    """Ten passes there and back. What this rank has sent of tokens and results, and all that its host has sent."""
    groups = connect(store, prefix, rank, placement, "gloo", address=address)
    torch.manual_seed(0)
    layer = MoELayer(SPEC, ExpertParallelContext(placement, rank, groups.exchange, nodes=NODES))
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.1)
    generator = torch.Generator().manual_seed(rank)
    dist.barrier()
    since, before = traffic_meter.Since(), _sent_by_host()
    for _ in range(PASSES):
        layer(torch.randn(1, TOKENS, SPEC.hidden_size, generator=generator, requires_grad=True)).sum().backward()
    dist.barrier()
    seen = since.look()
    return seen[TrafficKind.DISPATCH] + seen[TrafficKind.COMBINE], _sent_by_host() - before


def _sent_by_host() -> int:
    """Bytes that have left by `eth0`; what stays on the host goes by `lo`."""
    (line,) = [line for line in Path("/proc/self/net/dev").read_text().splitlines() if "eth0:" in line]
    return int(line.partition(":")[2].split()[8])


def test_tokens_cross_only_for_experts_that_their_node_lacks(ranks: HostRanks) -> None:
    apart, spread = ExpertPlacement.balanced(2, 4), ExpertPlacement.balanced(2, 4, NODES)
    crossing = {}
    for name, placement in {"one expert on each host": apart, "both on each": spread}.items():
        sent = ranks.run(_exchange, placement)
        by_ledger = sum(traffic.across for traffic, _ in sent)
        by_interface = _crossed([host for _, host in sent])
        print(f"{name}: {by_ledger:,} bytes by the ledger, {by_interface:,} left by the interfaces")
        assert sum(traffic.payload for traffic, _ in sent) > 10_000_000
        assert by_ledger <= by_interface <= FRAMES * by_ledger + 1_000_000  # and counts of rows, and barriers
        crossing[name] = by_ledger
    assert crossing["both on each"] == 0 < 10_000_000 < crossing["one expert on each host"]


def _train(
    rank: int,
    size: int,
    store: Store,
    prefix: str,
    address: str,
    placement: ExpertPlacement,
    nodes: tuple[str, ...],
) -> int:
    """Bytes that this rank's host sends in a whole step."""
    groups = connect(store, prefix, rank, placement, "gloo", address=address)
    spec = ModelSpec(
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        n_routed_experts=placement.num_experts,
        num_experts_per_tok=1 if placement.num_experts == 2 else 2,
        moe_intermediate_size=256,
    )
    model = MoELanguageModel(spec, VOCAB, ExpertParallelContext(placement, rank, groups.exchange, nodes=nodes))
    engine = DeepSpeedEngineAdapter(model, TrainSpec(sequence_length=LENGTH), groups, torch.device("cpu"))
    model.init_weights(0)
    engine.on_weights_initialized()
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
        engine.accumulate({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, ROWS * LENGTH * size, last=True)
        engine.step(1e-4)

    step()
    dist.barrier()
    before = _sent_by_host()
    for _ in range(STEPS):
        step()
    dist.barrier()
    engine.close()
    return (_sent_by_host() - before) // STEPS


def test_whole_steps_send_less_between_hosts_with_replicas_and_neighbours_as_they_are_placed(ranks: HostRanks) -> None:
    apart, spread, single = (
        ExpertPlacement.balanced(2, 4),
        ExpertPlacement.balanced(2, 4, NODES),
        ExpertPlacement.balanced(8, 4),
    )
    crossed = {
        name: _crossed(ranks.run(_train, placed, NODES)) for name, placed in (("apart", apart), ("spread", spread))
    }
    crossed["neighbours"] = _crossed(ranks.run(_train, single, NODES))
    alternating = (0, 1, 0, 1)
    with Hosts(2) as hosts, HostRanks(hosts, alternating) as others:
        sent = others.run(_train, single, tuple(f"host{home}" for home in alternating))
        crossed["alternating"] = sent[0] + sent[1]
    print({name: f"{num_bytes:,} bytes a step" for name, num_bytes in crossed.items()})
    assert crossed["spread"] < 0.8 * crossed["apart"]
    assert crossed["neighbours"] < 0.9 * crossed["alternating"]


def _crossed(sent: list[int]) -> int:
    return sent[0] + sent[2]  # of each host
